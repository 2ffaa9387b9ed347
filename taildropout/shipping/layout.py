"""Where the tensors of every width lie in one file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..pruning.cuts import Cut
from .boxes import Box, added, box_of, put, size_of

Scale: TypeAlias = tuple[float, float]
"""(factor, plus): what was x is `(x + plus) * factor - plus`."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the model, at each width of a menu.

    Attributes:
        shape: the whole tensor's.
        dtype: its name; None where the tensor itself is not in the file, but is cut.
        cuts: for each dim that is cut, the starts and ends of the runs of indices that stay at each
            width; None where all do.
        scales: for each width, what became of the numbers that stay; None where the tensor is not
            made of them.
    """

    shape: tuple[int, ...]
    dtype: str | None
    cuts: dict[int, list[list[int] | None]]
    scales: list[Scale | None]

    @classmethod
    def of(cls, record: Mapping[str, Any], widths: int) -> "Stored":
        scales = record.get("scales", [[1.0, 0.0]] * widths)
        return cls(
            tuple(record["shape"]),
            record.get("dtype"),
            {int(dim): runs for dim, runs in record.get("cuts", {}).items()},
            [None if scale is None else (scale[0], scale[1]) for scale in scales],
        )

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"shape": list(self.shape)}
        if self.dtype is not None:
            record["dtype"] = self.dtype
        if self.cuts:
            record["cuts"] = {str(dim): runs for dim, runs in self.cuts.items()}
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
    for name in in_order({n: stored.dtype for n, stored in tensors.items() if stored.dtype}):
        for box in tensors[name].added_at(width):
            yield name, box


def own_blocks(data: Tensor, own: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    """The tensors that only one width has, from the bytes of its part: dtypes and shapes by name."""
    tensors = {}
    for name in in_order({name: dtype for name, (dtype, _) in own.items()}):
        dtype, shape = own[name]
        tensors[name], data = first_of(data, shape, dtype)
    return tensors


def in_order(dtypes: Mapping[str, str]) -> list[str]:
    """How tensors lie one after the other: large numbers first, so that all are aligned."""
    return sorted(dtypes, key=lambda name: -dtype_of(dtypes[name]).itemsize)


class Assembly:
    """The tensors of one width, from the parts of all widths up to it."""

    def __init__(self, tensors: Mapping[str, Stored], width: int) -> None:
        self._tensors, self._width = tensors, width
        self.values = {
            name: torch.empty(size_of(stored.box(width)), dtype=dtype_of(stored.dtype))
            for name, stored in tensors.items()
            if stored.dtype is not None and stored.scales[width] is not None
        }

    def take(self, width: int, rest: Tensor) -> None:
        """From the bytes of the part that a width adds."""
        for name, box in blocks_of(self._tensors, width):
            stored = self._tensors[name]
            block, rest = first_of(rest, size_of(box), stored.dtype)
            if name in self.values:
                put(self.values[name], block, stored.box(self._width), box)

    def finish(self) -> dict[str, Tensor]:
        finished = {}
        for name, value in self.values.items():
            scale = self._tensors[name].scales[self._width]
            assert scale is not None
            finished[name] = scaled(value, scale)
        return finished


def first_of(data: Tensor, shape: Sequence[int], dtype: str | None) -> tuple[Tensor, Tensor]:
    """The tensor that bytes begin with, and the bytes behind it."""
    kind = dtype_of(dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    return data[:count].view(kind).reshape(tuple(shape)), data[count:]


def dtype_of(name: str | None) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype
