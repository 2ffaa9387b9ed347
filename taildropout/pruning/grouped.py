"""A batch cut into groups of samples of about one width, and what comes out of them as one again."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..draws import Draw, inverse_cdf
from ..functional.rows import inverse, permute
from ..layers import TailDropout
from ..models.width import rounded_up

Ks = tuple[int, ...]  # of the layers, in their order

_QUANTILES = 64  # of the samples, by width: groups end at some of them
_JUST_BELOW = 1 - 1e-12

Network = TypeVar("Network")


def groups_by_width(layers: Mapping[TailDropout, int], count: int) -> tuple[list[float], list[Ks]]:
    """Where groups end, as fractions of a batch, and the largest k of each layer in each group.

    Of all ways to cut the batch at its quantiles the cheapest, where a sample costs (w + w^2) / 2
    at a width w: modules lose features on one side, or on both.

    Args:
        layers: and the n of each.
        count: of groups at most.
    """
    ends = [i / _QUANTILES for i in range(1, _QUANTILES + 1)]
    ks = [largest_ks(layers, end) for end in ends]
    widths = [[k / n for k, n in zip(row, layers.values(), strict=True)] for row in ks]
    last = _cheapest([sum(w + w * w for w in row) for row in widths], count)
    return [ends[i] for i in last], [ks[i] for i in last]


def largest_ks(layers: Mapping[TailDropout, int], end: float) -> Ks:
    """The largest k that a sample draws whose number is below `end`, a bit larger for hardware."""
    number = torch.tensor([end * _JUST_BELOW], dtype=torch.float64)
    draw = Draw(number, None, torch.device("cpu"))
    return tuple(
        rounded_up(int(inverse_cdf(layer.lengths_for(n), n, draw)), _multiple(layer, n), n)
        for layer, n in layers.items()
    )


def _multiple(layer: TailDropout, n: int) -> int:
    """16 where n is large, less where that would cost: at most an eighth of n."""
    return layer.multiple_of if layer.multiple_of > 1 else min(16, 1 << max(n.bit_length() - 4, 0))


def _cheapest(costs: Sequence[float], count: int) -> list[int]:
    """The last entries of at most `count` groups, in which each costs as much as the last."""
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(float("inf"), [])] * len(costs)]
    for _ in range(count):
        best = [
            min(
                best[end],
                *(
                    (best[start][0] + (end - start) * costs[end - 1], [*best[start][1], end - 1])
                    for start in range(end)
                ),
            )
            if end
            else best[0]
            for end in range(len(best))
        ]
    return best[-1][1]


class Batch:
    """The arguments of a call, with its samples in the order of their ranks, cut into groups.

    Samples lie along the first dim of each tensor that has as many entries there.
    """

    def __init__(self, arguments: Any, rank: Tensor, ends: Sequence[int]) -> None:
        self._rank, self._order, samples = rank, inverse(rank), len(rank)
        self._slices = [slice(start, end) for start, end in pairwise([0, *ends])]
        leaves, self._spec = tree_flatten(arguments)
        self._leaves = [
            (permute(leaf, *self._on(leaf, self._order, rank)), True)
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples
            else (leaf, False)
            for leaf in leaves
        ]

    def groups(self, networks: Sequence[Network]) -> Iterator[tuple[Network, slice, Any]]:
        """Each network with its ranks and arguments, where it has any."""
        for network, ranks in zip(networks, self._slices, strict=True):
            if ranks.start < ranks.stop:
                leaves = [leaf[ranks] if cut else leaf for leaf, cut in self._leaves]
                yield network, ranks, tree_unflatten(leaves, self._spec)

    def together(self, outputs: Sequence[Any]) -> Any:
        """The outputs of all groups, with the samples in the order that they came in."""
        flat = [tree_flatten(output) for output in outputs]
        leaves = zip(*(leaves for leaves, _ in flat), strict=True)
        return tree_unflatten([self._joined(parts) for parts in leaves], flat[0][1])

    def _joined(self, parts: Sequence[Any]) -> Any:
        counts = [s.stop - s.start for s in self._slices if s.start < s.stop]
        if all(isinstance(part, Tensor) for part in parts):
            if [len(part) if part.ndim else None for part in parts] == counts:
                rows = torch.cat(list(parts))
                return permute(rows, *self._on(rows, self._rank, self._order))
        elif all(part is parts[0] or part == parts[0] for part in parts):
            return parts[0]
        found = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
        raise TypeError(
            "the model must return one row for each sample, to be trained in groups of "
            f"{counts} samples, got {found}: compute a loss from what the Elastic returns"
        )

    @staticmethod
    def _on(rows: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(index.to(rows.device) for index in indices)
