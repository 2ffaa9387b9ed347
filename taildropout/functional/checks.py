"""Arguments that several functions share: checked, and brought into one form."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .shards import is_sharded


def as_dims(batch_dim: int | Sequence[int]) -> tuple[int, ...]:
    """The dims that `batch_dim` names: it may be one, several, or none."""
    if isinstance(batch_dim, int):
        return (batch_dim,)
    try:
        return tuple(map(operator.index, batch_dim))
    except TypeError:
        raise TypeError(
            f"batch_dim must be an int or a sequence of ints, got {batch_dim!r}"
        ) from None


def resolve_dims(
    input: Tensor, batch_dim: int | Sequence[int], dropout_dim: int
) -> tuple[tuple[int, ...], int]:
    """Both as non-negative dims of `input`, checked to be different ones."""
    if isinstance(batch_dim, int):
        dims: tuple[int, ...] = (resolve_dim(input, batch_dim, "batch_dim"),)
    else:
        dims = tuple([resolve_dim(input, d, "batch_dim") for d in as_dims(batch_dim)])
    dim = resolve_dim(input, dropout_dim, "dropout_dim")
    if dim in dims or (len(dims) > 1 and len(set(dims)) < len(dims)):
        raise ValueError(
            "batch_dim and dropout_dim must be different dims, got "
            f"batch_dim={batch_dim} and dropout_dim={dropout_dim} for an input of shape "
            f"{tuple(input.shape)}"
        )
    return dims, dim


def resolve_dim(input: Tensor, dim: int, name: str) -> int:
    if not -input.ndim <= dim < input.ndim:
        raise IndexError(
            f"{name} must be a dim of the input, got {name}={dim} for an input of shape "
            f"{tuple(input.shape)}"
        )
    return range(input.ndim)[dim]


def count_samples(input: Tensor, batch_dim: int | Sequence[int], dropout_dim: int) -> int:
    batch_dims, _ = resolve_dims(input, batch_dim, dropout_dim)
    return math.prod([input.shape[d] for d in batch_dims])  # the compiler knows no generator here


def check_droppable(input: Tensor) -> None:
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(
            "tail dropout in training needs a floating-point or complex input, got "
            f"{input.dtype}: convert it, call eval(), or fix k with set_k(k)"
        )


def check_k(k: int | Tensor) -> int | Tensor:
    """k itself, as an int or an integer tensor."""
    if isinstance(k, Tensor):
        if is_sharded(k):
            raise TypeError(
                "k must be a plain tensor, the same in each process, with a k for every sample of "
                "the whole batch, got a DTensor: pass k.full_tensor()"
            )
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"k must be an integer tensor, got dtype {k.dtype}")
        return k.to(torch.int64)
    try:
        if isinstance(k, bool):
            raise TypeError
        return operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer or an integer tensor, got {k!r}") from None


def largest_k(k: int | Tensor) -> int:
    """The largest of the ks; raises if the smallest is negative.

    0 for a tensor without values to look at: empty, meta, fake, or inside vmap.
    """
    smallest = largest = k
    if isinstance(k, Tensor):
        if k.numel() == 0 or k.is_meta:
            return 0
        try:
            smallest, largest = int(k.min()), int(k.max())
        except RuntimeError:  # fake, or inside vmap
            return 0
    if smallest < 0:
        raise ValueError(f"k must be at least 0, got k={smallest}")
    return int(largest)


def check_k_at_most(k: int, n: int) -> None:
    if k > n:
        raise ValueError(f"k must be at most the number of features n={n}, got k={k}")


def align_k(k: Tensor, input: Tensor, dim: int) -> Tensor:
    """k with the input's number of dims, such that it broadcasts against it."""
    shape = list(k.shape)
    if k.ndim < input.ndim:
        others = [d for d in range(input.ndim) if d != dim]
        shape = [1] * input.ndim
        for d, size in zip(others, k.shape, strict=False):
            shape[d] = size
    fits = len(shape) == input.ndim and shape[dim] == 1
    if not fits or any(s not in (1, size) for s, size in zip(shape, input.shape, strict=True)):
        raise ValueError(
            "k must have one entry per sample (shape (batch,)) or broadcast against the input "
            f"with size 1 along dim {dim}, got shape {tuple(k.shape)} for an input of shape "
            f"{tuple(input.shape)}"
        )
    return k.reshape(shape)


def align_samples(
    k: int | Tensor, input: Tensor, batch_dim: int | Sequence[int], dropout_dim: int
) -> int | Tensor:
    """k, one for all samples or one for each index of `batch_dim`, such that it broadcasts."""
    if isinstance(k, int) or k.ndim == 0:
        return k
    batch_dims, _ = resolve_dims(input, batch_dim, dropout_dim)
    samples = tuple(input.shape[d] for d in batch_dims)
    if k.shape != samples:
        raise ValueError(
            f"k must have one entry for each index of batch_dim={batch_dim}, shape {samples}, "
            f"got shape {tuple(k.shape)} for an input of shape {tuple(input.shape)}"
        )
    return spread(k, input, batch_dims)


def spread(k: Tensor, input: Tensor, batch_dims: tuple[int, ...]) -> Tensor:
    """k, indexed by the batch dims in their order, with the input's number of dims."""
    if len(batch_dims) > 1:
        k = k.permute(sorted(range(k.ndim), key=lambda i: batch_dims[i]))
    shape = [1] * input.ndim
    for d in batch_dims:
        shape[d] = input.shape[d]
    return k.view(shape)
