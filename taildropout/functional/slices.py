"""Slices of a tensor, for several readers of parts of it.

What autograd makes of `tensor[a]`, `tensor[b]`, ... is right but slow: the gradient of each slice
is padded with zeros to the size of the whole, and then all of them are added up. Here each is added
where it belongs, in one tensor.
"""

from typing import Any

import torch
from torch import Tensor

Region = tuple[slice, ...]


def slices_of(tensor: Tensor, regions: tuple[Region, ...]) -> tuple[Tensor, ...]:
    """`tensor[region]` for each region: views, whose gradients arrive in the tensor."""
    if torch.compiler.is_compiling() or not (tensor.requires_grad and torch.is_grad_enabled()):
        return tuple(tensor[region] for region in regions)
    result: tuple[Tensor, ...] = _Slices.apply(tensor, regions)
    return result


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, regions: tuple[Region, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[region] for region in regions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[Region, ...]], output: Any) -> None:
        tensor, ctx.regions = inputs
        ctx.shape = tensor.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        found = [(r, g) for r, g in zip(ctx.regions, grads, strict=True) if g is not None]
        if not found:
            return None, None
        found.sort(key=lambda one: one[1].numel())
        region, widest = found.pop()
        if widest.shape == ctx.shape:
            total = widest.clone()
        else:
            total = widest.new_zeros(ctx.shape)
            total[region] = widest
        for region, grad in found:
            total[region] += grad
        return total, None
