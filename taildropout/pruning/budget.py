"""Widths for several layers under one budget."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..measuring.per_sample import Loss
from ..measuring.scree import scree
from ..models.inputs import Inputs
from ..models.insert import tail_dropouts
from ..models.width import rounded_up
from .plan import plan_pruning

_ANY = 1e-6  # a width at which each layer has one feature, or one group of them


@dataclass(frozen=True)
class WidthStep:
    """One choice of widths: what it costs, and the mean loss with its standard error."""

    widths: dict[str, int]
    cost: int
    loss: float
    stderr: float


@dataclass(frozen=True)
class WidthPath:
    """From the full widths down to the budget. Made by `choose_widths`.

    Attributes:
        of: what `cost` counts, "parameters" or "flops".
        steps: the first has all layers at full width, the last is the first within the budget.
    """

    of: str
    steps: list[WidthStep]

    @property
    def widths(self) -> dict[str, int]:
        """The widths within the budget: the k of `plan_pruning` and `prune`."""
        return self.steps[-1].widths


def choose_widths(
    model: nn.Module,
    loss: Loss,
    data: Iterable[tuple[Inputs, Any]],
    budget: float,
    example_inputs: Inputs,
    *,
    of: Literal["parameters", "flops"] = "parameters",
    steps: int = 16,
    multiple_of: int = 1,
    progress: bool = True,
) -> WidthPath:
    """Share out a budget among all TailDropout layers of a model.

    Greedily: all layers start at full width. For each layer the loss is measured at every k (with
    the others at their present widths), and the layer whose loss rises least for each parameter
    (or FLOP) saved gives up some of its features. Then everything is measured again, until the
    budget is met. A layer may give up anything from one step of 1/`steps` of its features to all
    that it has, so one that can lose many at once for nothing does.

    Args:
        model: trained with its TailDropout layers; it comes back as it was.
        loss: as in `scree`.
        data: as in `scree`, held out; it is gone through many times, so no generator.
        budget: the fraction of the full network's cost that may stay, in (0, 1].
        example_inputs: as in `plan_pruning`.
        of: what the budget counts.
        steps: into how many equal pieces a layer is cut. More are finer and take longer.
        multiple_of: round every width up to a multiple of it, as in `plan_pruning`.
        progress: show the progress bars of the measurements.

    Raises:
        ValueError: no TailDropout layer, a budget outside of (0, 1] or one that even layers of
            one feature (or of `multiple_of`) exceed, data that can be gone through once only.
        PruningError: as in `plan_pruning`.

    Example:
        >>> import torch
        >>> from taildropout import TailDropout
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(
        ...     nn.Linear(4, 8), TailDropout(), nn.Linear(8, 8), TailDropout(), nn.Linear(8, 2)
        ... )
        >>> batches = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(4)]
        >>> path = choose_widths(model, nn.MSELoss(), batches, 0.5, torch.randn(2, 4))
        >>> path.steps[0].widths, path.steps[-1].cost <= 0.5 * path.steps[0].cost
        ({'1': 8, '3': 8}, True)
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a fraction in (0, 1], got {budget}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if iter(data) is data:
        raise ValueError("data is gone through many times: pass a list or DataLoader, no generator")
    smallest = plan_pruning(model, _ANY, example_inputs, multiple_of=multiple_of)
    layers = {name: m for name, m in tail_dropouts(model).items() if name in smallest.k}
    first = next(iter(layers))

    def cost_at(widths: dict[str, int]) -> int:
        return int(getattr(smallest.at(widths, check=False).after, of))

    limit = budget * getattr(smallest.before, of)
    if getattr(smallest.after, of) > limit:
        raise ValueError(
            f"budget {budget} is too small: layers of {_features(multiple_of)} exceed it"
        )
    widths = dict(smallest.n)
    sizes = {
        name: _sizes(n, steps, math.lcm(multiple_of, layers[name].multiple_of))
        for name, n in widths.items()
    }
    path: list[WidthStep] = []
    while True:
        cost = cost_at(widths)
        best: tuple[tuple[float, float], dict[str, int]] | None = None
        for name in layers:
            ks = [k for k in sizes[name] if k <= widths[name]]
            with ExitStack() as stack:
                for other, layer in layers.items():
                    stack.enter_context(layer.using_k(None if other == name else widths[other]))
                curve = scree(model, loss, data, layer=name, ks=ks, progress=progress)
            if name == first:
                path.append(WidthStep(widths, cost, float(curve.loss[-1]), float(curve.stderr[-1])))
                if cost <= limit:
                    return WidthPath(of, path)
            if len(ks) < 2:
                continue
            # Costs are products of widths: along one of them they are a straight line.
            saved_by_all = cost - cost_at({**widths, name: ks[0]})
            for k, rise in zip(ks, (curve.loss - curve.loss[-1]).tolist(), strict=True):
                saved = saved_by_all * (ks[-1] - k) / (ks[-1] - ks[0])
                enough = cost - saved <= limit  # then a larger k will do, or is not enough
                if saved > 0 and (
                    not enough or k == _largest_enough(ks, saved_by_all, cost - limit)
                ):
                    rank = (rise / saved, -saved)
                    if best is None or rank < best[0]:
                        best = (rank, {**widths, name: k})
        assert best is not None  # some layer has more than one feature, or the budget is met
        widths = best[1]


def _largest_enough(ks: list[int], saved_by_all: float, needed: float) -> int | None:
    """The largest k that saves what is needed."""
    enough = [k for k in ks if saved_by_all * (ks[-1] - k) / (ks[-1] - ks[0]) >= needed]
    return max(enough, default=None)


def _sizes(n: int, steps: int, multiple_of: int) -> list[int]:
    """The widths that a layer of n features may take: multiples of about n / steps, from 1 on."""
    sizes = {max(1, round(n * step / steps)) for step in range(steps + 1)}
    return sorted({rounded_up(size, multiple_of, n) for size in sizes})


def _features(count: int) -> str:
    return "one feature" if count == 1 else f"{count} features"
