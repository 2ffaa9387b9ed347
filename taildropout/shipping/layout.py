"""Where the tensors of every width lie in one file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..pruning.cuts import Cut
from .boxes import Box, added, box_of, put, size_of

Scale: TypeAlias = tuple[float, float]
"""(factor, plus): what was x is `(x + plus) * factor - plus`."""

Runs: TypeAlias = list[list[int] | None]
"""For each width, the starts and ends of the runs of indices that stay; None where all do."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the model, at each width of a menu.

    Attributes:
        shape: the whole tensor's.
        dtype: its name; None where the tensor itself is not in the file, but is cut.
        cuts: for each dim that is cut, which indices stay at each width.
        scales: for each width, what became of the numbers that stay; None where the tensor is not
            made of them.
    """

    shape: tuple[int, ...]
    dtype: str | None
    cuts: dict[int, Runs]
    scales: list[Scale | None]

    @classmethod
    def of(cls, record: Mapping[str, Any], kept: Sequence[Runs], widths: int) -> "Stored":
        """From what `to_dict` made, and the list that it was given."""
        scales = record.get("scales", [[1.0, 0.0]] * widths)
        return cls(
            tuple(record["shape"]),
            record.get("dtype"),
            {int(dim): kept[which] for dim, which in record.get("cuts", {}).items()},
            [None if scale is None else (scale[0], scale[1]) for scale in scales],
        )

    def to_dict(self, kept: list[Runs]) -> dict[str, Any]:
        """As plain data. What stays goes to the end of `kept`, unless another tensor put it there."""
        record: dict[str, Any] = {"shape": list(self.shape)}
        if self.dtype is not None:
            record["dtype"] = self.dtype
        if self.cuts:
            for runs in self.cuts.values():
                if runs not in kept:
                    kept.append(runs)
            record["cuts"] = {str(dim): kept.index(runs) for dim, runs in self.cuts.items()}
        if any(scale != (1, 0) for scale in self.scales):
            record["scales"] = self.scales
        return record

    def box(self, width: int) -> Box:
        """What stays at a width, by its number in the menu."""
        runs = {dim: each[width] for dim, each in self.cuts.items()}
        return box_of(self.shape, {dim: ends for dim, ends in runs.items() if ends is not None})

    def narrower(self, width: int) -> Box | None:
        """What is made of the whole tensor at the next narrower width, of those where it is."""
        widths = [i for i in range(width) if self.scales[i] is not None]
        return self.box(widths[-1]) if widths else None

    def added_at(self, width: int) -> list[Box]:
        """What the part of a width holds of the tensor."""
        if self.dtype is None or self.scales[width] is None:
            return []
        return added(self.narrower(width), self.box(width))

    def cuts_at(self, name: str, width: int) -> Iterator[Cut]:
        for dim, each in self.cuts.items():
            runs = each[width]
            if runs is not None:
                pairs = zip(runs[::2], runs[1::2], strict=True)
                keep = tuple(index for start, end in pairs for index in range(start, end))
                yield Cut(name, dim, self.shape[dim], keep)


def scaled(tensor: Tensor, scale: Scale) -> Tensor:
    """As pruning makes it, to the bit."""
    factor, plus = scale
    if factor == 1:
        return tensor
    return ((tensor.double() + plus) * factor - plus).to(tensor.dtype)


def blocks_of(tensors: Mapping[str, Stored], width: int) -> Iterator[tuple[str, Box]]:
    """What the part of a width holds, in its order."""
    for name, stored in tensors.items():
        for box in stored.added_at(width):
            yield name, box


class Assembly:
    """The tensors of one width, from the parts of all widths up to it."""

    def __init__(self, tensors: Mapping[str, Stored], width: int) -> None:
        self._tensors, self._width = tensors, width
        self.values = {
            name: torch.empty(size_of(stored.box(width)), dtype=dtype_of(stored.dtype))
            for name, stored in tensors.items()
            if stored.dtype is not None and stored.scales[width] is not None
        }

    def take(self, width: int, following: Callable[[Sequence[int], torch.dtype], Tensor]) -> None:
        """From the part that a width adds, of which `following` reads the next tensor."""
        for name, box in blocks_of(self._tensors, width):
            stored = self._tensors[name]
            block = following(size_of(box), dtype_of(stored.dtype))
            if name in self.values:
                put(self.values[name], block, stored.box(self._width), box)

    def finish(self) -> dict[str, Tensor]:
        finished = {}
        for name, value in self.values.items():
            scale = self._tensors[name].scales[self._width]
            assert scale is not None
            finished[name] = scaled(value, scale)
        return finished


def dtype_of(name: str | None) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
