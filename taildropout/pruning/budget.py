"""Widths for several layers under one budget."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from torch import nn

from ..measuring.again import MeasuredAgain
from ..measuring.per_sample import Loss
from ..models.inputs import Inputs
from ..models.insert import tail_dropouts
from ..models.width import rounded_up
from .plan import PrunePlan, plan_pruning

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
    (or FLOP) saved gives up some of its features. Then all other layers are measured again, until
    the budget is met: what narrowing one does to the curves of the others is not to be foreseen. A layer may give up anything from one step of 1/`steps` of its features to all
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
    limit = budget * getattr(smallest.before, of)
    if getattr(smallest.after, of) > limit:
        raise ValueError(
            f"budget {budget} is too small: layers of {_features(multiple_of)} exceed it"
        )
    sizes = {
        name: _sizes(n, steps, math.lcm(multiple_of, layers[name].multiple_of))
        for name, n in smallest.n.items()
    }
    cost_at = _Costs(smallest, of, sizes)
    measured = MeasuredAgain(model, loss, data, layers, smallest.n, progress)
    widths = dict(smallest.n)
    curves = _curves(measured, widths, sizes)
    some = curves[next(iter(layers))]
    path = [WidthStep(widths, cost_at(widths), some.loss[-1], some.stderr[-1])]
    while path[-1].cost > limit:
        narrowed, k = _cheapest(curves, widths, cost_at, limit)
        now = curves[narrowed].up_to(k)  # for the layer itself nothing else has changed
        widths = {**widths, narrowed: k}
        path.append(WidthStep(widths, cost_at(widths), now.loss[-1], now.stderr[-1]))
        if path[-1].cost > limit:
            others = {
                name: ks for name, ks in sizes.items() if name != narrowed and ks[0] < widths[name]
            }
            curves = {narrowed: now, **_curves(measured, widths, others)}
    return WidthPath(of, path)


@dataclass(frozen=True)
class _Curve:
    """What one layer loses, the others at their widths: the last k is the present one."""

    ks: list[int]
    loss: list[float]
    stderr: list[float]

    def up_to(self, k: int) -> "_Curve":
        count = self.ks.index(k) + 1
        return _Curve(self.ks[:count], self.loss[:count], self.stderr[:count])


def _curves(
    measured: MeasuredAgain, widths: dict[str, int], sizes: dict[str, list[int]]
) -> dict[str, _Curve]:
    ks_of = {name: [k for k in ks if k <= widths[name]] for name, ks in sizes.items()}
    found = measured.curves(widths, ks_of)
    return {
        name: _Curve(ks_of[name], moments.mean.tolist(), moments.stderr().tolist())
        for name, moments in found.items()
    }


def _cheapest(
    curves: dict[str, _Curve], widths: dict[str, int], cost_at: "_Costs", limit: float
) -> tuple[str, int]:
    """The layer and the k at which the loss rises least for what is saved."""
    cost = cost_at(widths)
    ranks: dict[tuple[str, int], tuple[float, float]] = {}
    for name in widths:
        if name not in curves or len(curves[name].ks) < 2:
            continue
        ks, loss = curves[name].ks, curves[name].loss
        # Costs are products of widths: along one of them they are a straight line.
        saved_by_all = cost - cost_at({**widths, name: ks[0]})
        for k, at_k in zip(ks, loss, strict=True):
            saved = saved_by_all * (ks[-1] - k) / (ks[-1] - ks[0])
            enough = cost - saved <= limit  # then a larger k will do, or is not enough
            if saved > 0 and (not enough or k == _largest_enough(ks, saved_by_all, cost - limit)):
                ranks[name, k] = ((at_k - loss[-1]) / saved, -saved)
    return min(ranks, key=ranks.__getitem__)  # one has more than one k, or the budget is met


class _Costs:
    """What the network costs at any widths, from a few plans.

    The size of a tensor is a product of widths. So the cost is a straight line along each layer,
    and where two layers cut the same tensor, their product comes in: plans with one and with two
    layers at their lowest widths tell all others. Two more plans, with all layers narrow, show
    whether that is so; where it is not, each cost takes a plan of its own.
    """

    def __init__(self, plan: PrunePlan, of: str, sizes: dict[str, list[int]]) -> None:
        self.plan, self.of, self.n = plan, of, dict(plan.n)
        self.lowest = {name: ks[0] for name, ks in sizes.items() if ks[0] < plan.n[name]}
        self.planned: dict[tuple[int, ...], int] = {}
        self.terms: dict[tuple[str, ...], int] = {(): self._planned(self.n)}
        cut_by = {}
        for name in self.lowest:
            alone = self._plan({**self.n, name: self.lowest[name]})
            cut_by[name] = {cut.name for cut in alone.cuts}
            self.terms[name,] = self._cost(alone) - self.terms[()]
        for pair in combinations(self.lowest, 2):
            if cut_by[pair[0]] & cut_by[pair[1]]:
                both = {**self.n, **{name: self.lowest[name] for name in pair}}
                self.terms[pair] = self._planned(both) - self._from_terms(both)
        narrow = [
            {name: ks[0] for name, ks in sizes.items()},
            {name: ks[len(ks) // 2] for name, ks in sizes.items()},
        ]
        self.known = all(self._from_terms(w) == self._planned(w) for w in narrow)

    def __call__(self, widths: dict[str, int]) -> int:
        return self._from_terms(widths) if self.known else self._planned(widths)

    def _from_terms(self, widths: dict[str, int]) -> int:
        narrowed = {
            name: (self.n[name] - widths[name]) / (self.n[name] - lowest)
            for name, lowest in self.lowest.items()
        }
        cost = 0.0
        for names, term in self.terms.items():
            cost += term * math.prod([narrowed[name] for name in names])
        return round(cost)

    def _planned(self, widths: dict[str, int]) -> int:
        key = tuple(widths.values())
        if key not in self.planned:
            self.planned[key] = self._cost(self._plan(widths))
        return self.planned[key]

    def _plan(self, widths: dict[str, int]) -> PrunePlan:
        return self.plan.at(widths, check=False)

    def _cost(self, plan: PrunePlan) -> int:
        return int(getattr(plan.after, self.of))


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
