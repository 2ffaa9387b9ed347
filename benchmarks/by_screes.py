"""What `choose_widths` does, the plain way."""

from collections.abc import Iterable
from contextlib import ExitStack

from torch import Tensor, nn

import taildropout as td
from taildropout.pruning.budget import _sizes


def by_screes(
    model: nn.Module,
    loss: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    budget: float,
    example_inputs: Tensor,
    steps: int = 16,
) -> list[dict[str, int]]:
    """The widths on the way to the budget of parameters: in each round all layers are measured,
    and every cost is that of a plan."""
    layers = td.tail_dropouts(model)
    plan = td.plan_pruning(model, dict.fromkeys(layers, 1.0), example_inputs)

    def cost_at(widths: dict[str, int]) -> int:
        return plan.at(widths, check=False).after.parameters

    path = [dict(plan.n)]
    while True:
        widths, cost = path[-1], cost_at(path[-1])
        needed = cost - budget * plan.before.parameters
        if needed <= 0:
            return path
        ranked = []
        for name, layer in layers.items():
            ks = [k for k in _sizes(plan.n[name], steps, layer.multiple_of) if k <= widths[name]]
            with ExitStack() as stack:
                for other, at in layers.items():
                    stack.enter_context(at.using_k(None if other == name else widths[other]))
                curve = td.scree(model, loss, data, layer=name, ks=ks, progress=False)
            saved = [cost - cost_at({**widths, name: ks[0]})] if len(ks) > 1 else []
            saved = [saved[0] * (ks[-1] - k) / (ks[-1] - ks[0]) for k in ks[:-1]] if saved else []
            more_than_needed = [s for s in saved if s >= needed][:-1]
            for k, s, at_k in zip(ks, saved, curve.loss.tolist(), strict=False):
                if s > 0 and s not in more_than_needed:
                    ranked.append(((at_k - float(curve.loss[-1])) / s, -s, name, k))
        _, _, name, k = min(ranked, key=lambda rank: rank[:2])
        path.append({**widths, name: k})
