"""Tail dropout: draw k, keep a prefix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..draws import draw
from ..lengths import Lengths, lengths_or_exponential
from .checks import check_droppable, resolve_dims, spread
from .prefix import zero_tail
from .shards import as_in_first_process


def tail_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    batch_dim: int | Sequence[int] = 0,
    dropout_dim: int = -1,
    *,
    lengths: Lengths | None = None,
    stratified: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """In training, keep a random number k of the first features of each sample, zero the rest.

    In training a fresh k is drawn for each index of `batch_dim` and shared along every other
    dim: the first k of the n features along `dropout_dim` are kept bit for bit and the others,
    the tail, are zero, even where the input is NaN or Inf; so is their gradient. With
    `training=False` the input itself is returned. Neither mode rescales.

    The backward pass needs k only: one integer per sample is saved, not a mask, of inputs above
    64 KiB.

    Args:
        input: any shape; floating-point or complex.
        p: expected fraction of features dropped, E[1 - k/n], in [0, 1]; not used if `lengths` is
            given. Inside `torch.compile` a 0-dim float64 tensor does the same, and a change of
            its value does not recompile.
        training: whether to drop.
        batch_dim: the dim, or dims, whose every index is a sample with its own k. `()`: one k
            for the whole call.
        dropout_dim: the dim along which the features lie.
        lengths: distribution of k. None: `Exponential(p)`.
        stratified: spread the ks of one call evenly over their distribution. Each k keeps its
            exact probability; a loss averaged over the batch varies less.
        inplace: write the result into `input`.
        generator: source of randomness, torch's global one by default.

    Returns:
        Shape, dtype, device and memory format of `input`.

    Raises:
        ValueError: p outside [0, 1] or NaN, `dropout_dim` among the batch dims.
        IndexError: a dim that the input does not have.
        TypeError: lengths without a pmf, dims that are no ints, an integer or boolean input in
            training.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tail_dropout(torch.ones(4, 6))
        tensor([[1., 1., 0., 0., 0., 0.],
                [1., 0., 0., 0., 0., 0.],
                [1., 1., 1., 1., 1., 1.],
                [1., 1., 1., 1., 0., 0.]])

    Source: nested dropout, Rippel, Gelbart and Adams (2014), arXiv 1402.0915, with the censored
    exponential lengths of TailDropout, Egil Martinsson (2018).
    """
    lengths = lengths_or_exponential(lengths, p)
    if not training:
        return input
    check_droppable(input)
    batch_dims, dim = resolve_dims(input, batch_dim, dropout_dim)
    samples = [input.shape[d] for d in batch_dims]
    k = draw(
        lengths,
        input.shape[dim],
        math.prod(samples),
        stratified=stratified,
        device=input.device,
        generator=generator,
    )
    k = as_in_first_process(k, input).view(samples)
    return zero_tail(input, spread(k, input, batch_dims), dim, inplace)
