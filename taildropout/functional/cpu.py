"""keep_prefix on the CPU, in eager mode, at nearly the speed of a copy.

The floor is to read the input once and to write the output once, as `clone` does. The obvious
`torch.where(position < k, input, 0)` takes several times as long, since comparing and selecting
with a broadcast mask is not vectorised. And-ing the bits of the input with a mask of all ones or
all zeros is, and leaves neither NaN nor Inf behind (multiplying by 0 would).

The mask's row for one k is a window of n entries onto the sequence `[-1] * n + [0] * n`, so the
mask of a batch is one `index_select` of rows from the overlapping view of all windows: rows that
are read from the cache and written once. Where every entry of the input has its own entry in the
mask, the result is and-ed into the mask itself: in all one allocation, two writes and two reads.
Where many share one (the pixels of an image, the times of a sequence), the mask is small and the
`and` is all that is left.

`benchmarks/layer.py` measures the distance from the floor. Under `torch.compile` none of this is
used: the compiler fuses the obvious form into one loop.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry


def as_bits(input: Tensor) -> Tensor | None:
    """A view of the input as integers, or None where that or the `and` is not to be had."""
    ordinary = (
        type(input) in (Tensor, nn.Parameter)  # not fake, nor another subclass
        and input.device.type == "cpu"
        and input.layout == torch.strided
        and input.itemsize in _BITS
        and input.numel() > 0
        and not (input.is_conj() or input.is_neg() or input.is_quantized)
    )
    try:
        return input.view(_BITS[input.itemsize]) if ordinary else None
    except RuntimeError:  # gradients that autograd.grad(..., is_grads_batched=True) computes
        return None


def keep_prefix(bits: Tensor, k: Tensor, dim: int) -> Tensor:
    """The bits of the first k <= n features along `dim`; k is on the CPU and broadcasts."""
    n = bits.shape[dim]
    if k.numel() == 1:
        return _keep_one_prefix(bits, int(k), dim)
    mask = _windows(n, bits.dtype).index_select(0, n - k.flatten())
    if mask.shape == bits.shape and dim == 1 and bits.is_contiguous():
        return mask.bitwise_and_(bits)
    shape = (1,) * (bits.ndim - k.ndim) + k.shape  # 1 along dim
    mask = mask.view(*shape[:dim], *shape[dim + 1 :], n).movedim(-1, dim)
    output = torch.empty_like(bits)
    return torch.bitwise_and(bits, mask, out=output)


def _keep_one_prefix(bits: Tensor, k: int, dim: int) -> Tensor:
    output = torch.empty_like(bits)
    output.narrow(dim, 0, k).copy_(bits.narrow(dim, 0, k))
    output.narrow(dim, k, bits.shape[dim] - k).zero_()
    return output


@lru_cache(maxsize=8)
def _windows(n: int, dtype: torch.dtype) -> Tensor:
    """Shape (n + 1, n), on 2n entries: the row i has n - i integers with all bits set, then zeros."""
    size = n * dtype.itemsize
    ones_and_zeros = torch.frombuffer(bytearray(b"\xff" * size + b"\x00" * size), dtype=dtype)
    return ones_and_zeros.unfold(0, n, 1)
