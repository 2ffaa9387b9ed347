"""Keep a prefix of the features, zero the tail."""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..draws import is_plain
from . import cpu
from .checks import align_k, check_k, check_k_at_most, largest_k, resolve_dim
from .shards import is_sharded, k_of_part, with_part


def keep_prefix(input: Tensor, k: int | Tensor, dim: int = -1, *, inplace: bool = False) -> Tensor:
    """Keep the first k features along `dim` and zero the rest, in training and in eval alike.

    The kept features are bit for bit the input's. The others are zero, even where the input is
    NaN or Inf, and so is their gradient. Only k is saved for the backward pass; of an input of up to
    64 KiB a mask may be.

    Args:
        input: any shape and dtype.
        k: how many features to keep: an int in 0, ..., n, or an integer tensor. A tensor with as
            many dims as the input has size 1 along `dim` and broadcasts along the others; one
            with fewer dims is aligned from the left with the input's dims other than `dim`:
            shape `(batch,)` is one k per sample, whatever the number of dims behind.
        dim: the dim along which the features lie.
        inplace: write the result into `input`.

    Returns:
        Shape, dtype, device and memory format of `input`.

    Raises:
        ValueError: k is negative or above n, or its shape does not fit. (The values are not
            looked at in a compiled call, nor under vmap: there a k above n keeps everything.)
        TypeError: k is not an integer.
        IndexError: a dim that the input does not have.

    Example:
        >>> keep_prefix(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([1, 2]))
        tensor([[1., 0., 0.],
                [4., 5., 0.]])
    """
    dim = resolve_dim(input, dim, "dim")
    k = check_k(k)
    if not torch.compiler.is_compiling():
        check_k_at_most(largest_k(k), input.shape[dim])
    if isinstance(k, Tensor):
        k = align_k(k, input, dim)
    return zero_tail(input, k, dim, inplace)


def zero_tail(input: Tensor, k: int | Tensor, dim: int, inplace: bool) -> Tensor:
    """`keep_prefix` for a checked k: an int, or a tensor that broadcasts against the input."""
    dim = range(input.ndim)[dim]
    if is_sharded(input):
        part = zero_tail(input.to_local(), k_of_part(k, input, dim), dim, inplace=False)
        whole = with_part(input, part)
        return input.copy_(whole) if inplace else whole
    k = k.to(input.device) if isinstance(k, Tensor) else torch.tensor(k, device="cpu")
    # The compiler fuses this, and saves k by itself. Of a small input autograd may save a mask.
    if torch.compiler.is_compiling() or input.nbytes <= _SMALL:
        output = _zero_where_not_kept(input, k, dim)
    else:
        output = _apply_keep_prefix(input, k, dim)
    return input.copy_(output) if inplace else output


_SMALL = 2**16  # bytes, up to which the fixed cost of an autograd.Function is more than a mask's


def _zero_where_not_kept(input: Tensor, k: Tensor, dim: int) -> Tensor:
    kept = is_plain(input) and input.nbytes <= _SMALL
    constants = _kept_constants if kept else _constants
    position, zero = constants(input.shape[dim], dim, input.ndim, input.dtype, input.device)
    output = torch.where(position < k, input, zero)
    if kept and output.stride() == input.stride():
        return output
    like_input = torch.empty_like(input)
    if output.stride() != like_input.stride():  # where may take its strides from the mask
        output = like_input.copy_(output)
    return output


def _constants(
    n: int, dim: int, ndim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The position of each feature along one of so many dims, and 0."""
    position = torch.arange(n, device=device).view([n if d == dim else 1 for d in range(ndim)])
    return position, torch.zeros((), dtype=dtype, device=device)


_kept_constants = lru_cache(maxsize=32)(_constants)


def _apply_keep_prefix(input: Tensor, k: Tensor, dim: int) -> Tensor:
    output: Tensor = _KeepPrefix.apply(input, k, dim)
    return output


class _KeepPrefix(torch.autograd.Function):
    """Zeroes the tail and saves k, where autograd would save a mask of the input's size."""

    @staticmethod
    def forward(input: Tensor, k: Tensor, dim: int) -> Tensor:
        bits = cpu.as_bits(input) if type(k) is Tensor and k.device.type == "cpu" else None
        if bits is not None:
            return cpu.keep_prefix(bits, k, dim).view(input.dtype)
        return _zero_where_not_kept(input, k, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, k, ctx.dim = inputs
        ctx.save_for_backward(k)
        ctx.save_for_forward(k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (k,) = ctx.saved_tensors
        return _apply_keep_prefix(grad, k, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (k,) = ctx.saved_tensors
        return _apply_keep_prefix(tangent, k, ctx.dim)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], input: Tensor, k: Tensor, dim: int
    ) -> tuple[Tensor, int]:
        input_dim, k_dim, _ = in_dims
        if input_dim is None:
            input = input.expand(info.batch_size, *input.shape)
        else:
            input = input.movedim(input_dim, 0)
        k = k.clamp(max=input.shape[dim + 1])  # nobody could look at the values before
        if k_dim is not None:
            k = k.movedim(k_dim, 0)
            k = k.reshape(len(k), *[1] * (input.ndim - k.ndim), *k.shape[1:])
        return _apply_keep_prefix(input, k, dim + 1), 0


# autograd.Function looks the signature up in each call; it is quicker to find than to make.
_KeepPrefix.forward.__signature__ = inspect.signature(_KeepPrefix.forward)  # type: ignore[attr-defined]
