"""Rows of a batch: rearranged, and read by several consumers, each the first few of them.

What autograd makes of `rows[order]` and of `rows[:m]` is right but slow: the gradient of the one
is added up row by row, and each gradient of the other is padded with zeros to the full size
first. Both are linear maps whose transposes are as simple as they are, written down here. While
compiling, the plain forms are used, which the compiler fuses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def permute(rows: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """`rows[order]`, where `order[position]` is 0, 1, 2, ...: its gradient is `grad[position]`."""
    if torch.compiler.is_compiling():
        return rows.index_select(0, order)
    result: Tensor = _Permute.apply(rows, order, position)
    return result


def inverse(position: Tensor) -> Tensor:
    """The order for which `order[position]` is 0, 1, 2, ...: of one it is the other."""
    rows = torch.arange(len(position), device=position.device)
    return torch.empty_like(position).scatter_(0, position, rows)


def first_rows(rows: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`rows[:count]` for each of the falling counts."""
    if torch.compiler.is_compiling():
        return tuple(rows[:count] for count in counts)
    result: tuple[Tensor, ...] = _FirstRows.apply(rows, counts)
    return result


def sum_of_rows(parts: tuple[Tensor, ...], count: int) -> Tensor:
    """The sum of all parts, each padded with rows of zeros at its end to `count` rows."""
    if torch.compiler.is_compiling():
        padded = [pad(part, [0, 0] * (part.ndim - 1) + [0, count - len(part)]) for part in parts]
        return sum(padded[1:], padded[0])
    result: Tensor = _SumOfRows.apply(count, *parts)
    return result


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, order: Tensor, position: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, order, position = inputs
        ctx.save_for_backward(order, position)
        ctx.save_for_forward(order, position)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, position = ctx.saved_tensors
        return permute(grad, position, order), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        order, position = ctx.saved_tensors
        return permute(tangent, order, position)


class _FirstRows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(rows[:count] for count in counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, ...]], output: Any) -> None:
        rows, ctx.counts = inputs
        ctx.total = len(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_of_rows(grads, ctx.total), None


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(count: int, *parts: Tensor) -> Tensor:
        dtype = torch.promote_types(parts[0].dtype, torch.float32)  # to add up at
        total = parts[0].new_zeros(count, *parts[0].shape[1:], dtype=dtype)
        for part in parts:
            total[: len(part)] += part
        return total.to(parts[0].dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.counts = tuple(len(part) for part in inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *first_rows(grad, ctx.counts)
