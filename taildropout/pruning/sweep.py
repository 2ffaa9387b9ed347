"""What each k costs: parameters, FLOPs and time, to stand beside the scree."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..measuring.curve import Scree
from ..models.inputs import Inputs, call
from ..models.width import Widths


@dataclass(frozen=True)
class SweepPoint:
    """The network cut to k: parameters, FLOPs and seconds of one call on the example inputs."""

    k: Widths
    parameters: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """What each of several ks costs. Made by `PrunePlan.sweep`."""

    points: list[SweepPoint]

    def table(self, scree: Scree | None = None) -> str:
        """One line for each k; with a scree also its loss and standard error.

        Raises:
            ValueError: the scree has not measured one of the ks, or other features than the first.
        """
        head = ["k", "parameters", "FLOPs", "ms"]
        rows = [
            [str(p.k), f"{p.parameters:,}", f"{p.flops:,}", f"{1e3 * p.seconds:.3g}"]
            for p in self.points
        ]
        if scree is not None:
            head.insert(1, "loss")
            for row, (loss, stderr) in zip(rows, self.losses(scree), strict=True):
                row.insert(1, f"{loss:.5g} ± {stderr:.2g}")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [head, *rows]
        )

    def losses(self, scree: Scree) -> list[tuple[float, float]]:
        """Loss and standard error at each k of the sweep."""
        if scree.features != "first":
            raise ValueError(
                "networks are cut to their first features: the scree must be one with "
                f'features="first", got {scree.features!r}'
            )
        missing = [p.k for p in self.points if p.k not in scree.ks]
        if missing:
            raise ValueError(
                f"the scree must have measured each k of the sweep, got none at {missing}"
            )
        at = [scree.ks.index(p.k) for p in self.points]
        return [(float(scree.loss[i]), float(scree.stderr[i])) for i in at]


@torch.no_grad()
def seconds_per_call(models: Sequence[nn.Module], inputs: Inputs, repeats: int = 15) -> list[float]:
    """Median seconds of one call of each model; they take turns."""
    times: list[list[float]] = [[] for _ in models]
    cuda = torch.cuda.is_available()
    for round_ in range(repeats + 1):  # the first warms up
        for model, seconds in zip(models, times, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call(model, inputs)
            if cuda:
                torch.cuda.synchronize()
            if round_ > 0:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]
