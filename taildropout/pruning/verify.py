"""Comparing a network with what was made of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..models.copies import PruningError
from ..models.inputs import Inputs, call

# The largest difference, relative to the largest output, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> Any:
    copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    return call(model, copied)


def run_pruned(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return run(model, inputs)
    except Exception as error:
        raise PruningError(
            f"the pruned network does not run: {error}. Its forward may spell out a size that "
            "pruning changes, as in x.view(-1, 3136): read it from the tensors instead, as in "
            "x.flatten(1). With k = 0, a layer may be one that torch can't run on no features"
        ) from error


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def compare(
    k: dict[str, int], large: nn.Module, small: nn.Module, inputs: Inputs, expected: Any
) -> None:
    difference, scale = difference_of(expected, run_pruned(small, inputs))
    if difference is None:
        return
    message = (
        f"the pruned network must compute what the model computes with k={k}, but differs by up "
        f"to {difference:.3g} where the outputs are up to {scale:.3g}"
    )
    module = _first_that_differs(large, small, inputs)
    if module is not None:
        message += f", first in the output of module {module!r}"
    raise PruningError(f"{message}. (If the weights have changed since plan_pruning, plan again.)")


def difference_of(expected: Any, actual: Any) -> tuple[float | None, float]:
    """The largest difference and the largest output, where that is more than rounding."""
    for one, other in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if not isinstance(one, Tensor) or one.numel() == 0:
            continue
        if one.shape != other.shape:
            raise PruningError(
                f"an output of the pruned network has shape {tuple(other.shape)} instead of "
                f"{tuple(one.shape)}"
            )
        same = (one == other) | (one.isnan() & other.isnan())
        if one.dtype is torch.bool:
            one, other = one.int(), other.int()
        difference = torch.where(same, 0, (one - other).abs()).max().item()
        scale = one.nan_to_num(posinf=0, neginf=0).abs().max().item()
        precision = one.dtype.to_real() if one.is_complex() else one.dtype
        if not difference <= TOLERANCE.get(precision, 0) * max(scale, 1e-30):
            return difference, scale
    return None, 0.0


def _first_that_differs(large: nn.Module, small: nn.Module, inputs: Inputs) -> str | None:
    """The first module to return whose output has kept its shape, but not its values."""
    outputs: list[list[tuple[str, Tensor]]] = []
    for model in (large, small):
        seen: list[tuple[str, Tensor]] = []
        handles = [
            module.register_forward_hook(
                lambda module, args, output, name=name, seen=seen: seen.append((name, output))
            )
            for name, module in model.named_modules()
            if name
        ]
        try:
            run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        outputs.append(seen)
    for (name, one), (_, other) in zip(*outputs, strict=False):
        comparable = isinstance(one, Tensor) and isinstance(other, Tensor)
        if comparable and one.shape == other.shape and difference_of(one, other)[0] is not None:
            return str(name)
    return None
