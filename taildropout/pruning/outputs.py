"""What a network returns, when the features that it returns are cut too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..graph.dataflow import Dataflow
from ..graph.features import Solution
from ..models.copies import PruningError


@dataclass(frozen=True)
class OutputCut:
    """Of the `size` features along `dim` of a returned value, only `keep` stay.

    `position` is that of the value among all that the model returns.
    """

    position: int
    dim: int
    size: int
    keep: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"returned value {self.position} keeps {len(self.keep)} of {self.size} features "
            f"along dim {self.dim}"
        )


def cuts_of_outputs(flow: Dataflow, found: Solution, stays: Sequence[str]) -> list[OutputCut]:
    """All that goes from what the model returns: the tails of the layers, or nothing at all.

    Args:
        flow: of the model.
        found: with `outputs`.
        stays: what stays behind the layers, and why, for the message.

    Raises:
        PruningError: no tail is returned, or one that stays.
    """
    cuts = [cut for outputs in flow.outputs for cut in _cuts_of_path(outputs, found)]
    if not cuts:
        because = f" ({'; '.join(stays)})" if stays else ""
        raise PruningError(
            "outputs=True cuts the features of a TailDropout that the model returns, and it "
            f"returns none{because}: put the layer behind what is returned, or prune without"
        )
    of_all = dict.fromkeys(cuts)
    if len(cuts) != len(of_all) * len(flow.outputs):
        raise PruningError(
            "outputs=True cuts the features that the model returns, and at other sizes of its "
            "inputs it returns others: prune without"
        )
    return [cut for cut in of_all if len(cut.keep) < cut.size]


def _cuts_of_path(outputs: Sequence[fx.Node | None], found: Solution) -> Iterator[OutputCut]:
    for position, node in enumerate(outputs):
        for place, tail in found.tails.items():
            if place[0] is not node:
                continue
            reasons = [
                found.reasons[number] for number in found.stays[place][tail].unique() if number
            ]
            if not tail.any() and place in found.constants.lost:  # one half of it gates the other
                reasons = [(found.constants.lost[place], "joins them with others")]
            if reasons:
                raise PruningError(
                    "outputs=True cuts the features that the model returns to k, but they stay: "
                    + "; ".join(f"{name} {reason}" for name, reason in reasons)
                )
            keep = tuple((~tail).nonzero().flatten().tolist())
            yield OutputCut(position, place[1], len(tail), keep)


def what_stays(returned: Any, cuts: Sequence[OutputCut]) -> Any:
    """What the large network returns, without what goes: all values in a row.

    Raises:
        PruningError: what goes is not zero.
    """
    if not cuts:
        return returned
    values = tree_leaves(returned)
    for cut in cuts:
        value: Tensor = values[cut.position]
        keep = torch.tensor(cut.keep, dtype=torch.int64, device=value.device)
        goes = torch.ones(cut.size, dtype=torch.bool, device=value.device)
        goes[keep] = False
        if value.index_select(cut.dim, goes.nonzero().flatten()).any():
            raise PruningError(
                "what goes from the output of the model must be zero, and with k set it is not: "
                "prune without outputs=True"
            )
        values[cut.position] = value.index_select(cut.dim, keep)
    return values
