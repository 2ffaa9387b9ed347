"""Boxes of a tensor: what each width of a menu adds to the narrower ones."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import TypeAlias

import torch
from torch import Tensor

from ..pruning.narrowed import Range, ranges

Box: TypeAlias = tuple[Tensor, ...]
"""For each dim, which indices belong to it: bool, of the tensor's size."""


def box_of(shape: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Box:
    """The indices that stay, where those along the dims in `kept` do: starts and ends of runs."""
    box = tuple(torch.full((size,), dim not in kept) for dim, size in enumerate(shape))
    for dim, ends in kept.items():
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            box[dim][start:end] = True
    return box


def runs_of(keep: Sequence[int]) -> list[int]:
    """Starts and ends of the runs of consecutive indices.

    Example:
        >>> runs_of([0, 1, 2, 6, 7])
        [0, 3, 6, 8]
    """
    return [end for run in ranges(keep) for end in run]


def is_within(inner: Box, outer: Box) -> bool:
    return not any(bool((a & ~b).any()) for a, b in zip(inner, outer, strict=True))


def size_of(box: Box) -> list[int]:
    return [int(indices.sum()) for indices in box]


def added(before: Box | None, after: Box) -> list[Box]:
    """Disjoint boxes that are `after` together with `before`, which lies in it."""
    if before is None:
        return [after]
    boxes = [
        (*before[:dim], after[dim] & ~before[dim], *after[dim + 1 :]) for dim in range(len(after))
    ]
    return [box for box in boxes if 0 not in size_of(box)]


def taken(tensor: Tensor, box: Box) -> Tensor:
    """What lies in the box."""
    for dim, indices in enumerate(box):
        if not indices.all():
            tensor = tensor.index_select(dim, indices.nonzero().flatten().to(tensor.device))
    return tensor


def put(target: Tensor, block: Tensor, keep: Box, box: Box) -> None:
    """Write what lies in `box` of a tensor to where it stands in what lies in `keep` of it."""
    places = []
    for kept, indices in zip(keep, box, strict=True):
        runs = [(0, len(kept))] if indices.all() else _runs_within(kept, indices)
        ends = list(accumulate(end - start for start, end in runs))
        source = zip([0, *ends], ends, strict=False)
        places.append([(slice(*to), slice(*of)) for to, of in zip(runs, source, strict=True)])
    for place in product(*places):
        target[tuple(to for to, _ in place)] = block[tuple(of for _, of in place)]


def _runs_within(kept: Tensor, indices: Tensor) -> list[Range]:
    """Where the indices stand among those that are kept."""
    return list(ranges((kept.cumsum(0) - 1)[indices].tolist()))
