"""A two-layer network, gated or not, that drops a tail in between without computing it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from ..draws import Draw, draw_uniforms, inverse_cdf
from ..lengths import Lengths, lengths_or_exponential
from .checks import count_samples, resolve_dims, spread
from .prefix import zero_tail
from .rows import first_rows, inverse, permute, sum_of_rows
from .shards import check_whole_mlp

Affine = tuple[Tensor, Tensor | None]  # weight and bias of a linear map


def tail_mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    p: float = 0.5,
    training: bool = True,
    batch_dim: int | Sequence[int] = 0,
    *,
    activation: Callable[[Tensor], Tensor] = gelu,
    lengths: Lengths | None = None,
    blocks: int | None = None,
    generator: torch.Generator | None = None,
    weight_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
) -> Tensor:
    """`linear(tail_dropout(activation(linear(input))))`, without computing the tail.

    With a gate the hidden features are `activation(linear_gate(input)) * linear1(input)`.

    In training the rows are arranged by falling k and the hidden features are cut into blocks;
    each block is computed for those rows only whose k reaches it: a staircase, of about a
    fraction 1 - p of the matrix products, forward and backward. The draws are stratified, so
    how many rows reach a block at most is known before drawing, and nothing waits for the device.
    Random state included, the result and all gradients are those of the functions in turn.
    With `training=False` nothing is dropped.

    Args:
        input: `(..., in_features)`.
        weight1: `(hidden_features, in_features)`.
        bias1: `(hidden_features,)`, or None.
        weight2: `(out_features, hidden_features)`.
        bias2: `(out_features,)`, or None.
        p: expected fraction of the hidden features dropped; not used if `lengths` is given.
        training: whether to drop.
        batch_dim: the dim, or dims, of the input whose every index draws its own k.
        activation: any elementwise function.
        lengths: distribution of k. None: `Exponential(p)`.
        blocks: into how many blocks the hidden features are cut: more leave less of the tail
            in, but make for smaller matrix products. None: of 256 features each, at most 16.
        generator: source of randomness, torch's global one by default.
        weight_gate: of the shape of `weight1`. None: there is no gate.
        bias_gate: `(hidden_features,)`, or None.

    Returns:
        Shape `(..., out_features)`.

    Raises:
        ValueError: p outside [0, 1] or NaN, fewer than one block.
        IndexError: a dim that the input does not have.
        TypeError: lengths without a pmf, dims that are no ints.

    Example:
        >>> weight1, weight2 = torch.randn(64, 8), torch.randn(2, 64)
        >>> tail_mlp(torch.randn(32, 8), weight1, None, weight2, None, p=0.8).shape
        torch.Size([32, 2])
    """
    lengths = lengths_or_exponential(lengths, p)
    into: list[Affine] = [] if weight_gate is None else [(weight_gate, bias_gate)]
    into.append((weight1, bias1))
    if not training:
        return linear(hidden_features(input, into, activation), weight2, bias2)
    count = count_samples(input, batch_dim, -1)
    output, _ = tail_mlp_of_draw(
        input,
        into,
        (weight2, bias2),
        batch_dim,
        activation=activation,
        lengths=lengths,
        draw=draw_uniforms(count, device=input.device, generator=generator),
        blocks=blocks,
    )
    return output


def hidden_features(
    input: Tensor, into: Sequence[Affine], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`activation(linear(input))`; of two linear maps, the first is the gate of the other."""
    first, *gated = into
    hidden = activation(linear(input, *first))
    return hidden * linear(input, *gated[0]) if gated else hidden


def tail_mlp_of_draw(
    input: Tensor,
    into: Sequence[Affine],
    out: Affine,
    batch_dim: int | Sequence[int],
    *,
    activation: Callable[[Tensor], Tensor],
    lengths: Lengths,
    draw: Draw,
    blocks: int | None,
) -> tuple[Tensor, Tensor]:
    """`tail_mlp` in training, and the k of each sample: one per index of the batch dims."""
    if draw.rank is None:
        raise ValueError(
            "only stratified draws tell beforehand how much of the tail can be left out, got "
            "independent ones: set stratified=True"
        )
    weight2, bias2 = out
    check_whole_mlp(input, weight2, *(weight for weight, _ in into))
    n = weight2.shape[1]
    blocks = min(max(n // 256, 1), 16) if blocks is None else blocks
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    batch_dims, _ = resolve_dims(input, batch_dim, -1)
    leading = tuple(range(len(batch_dims)))
    rows = input.movedim(batch_dims, leading)
    samples = rows.shape[: len(batch_dims)]
    rows = rows.flatten(0, len(batch_dims) - 1) if batch_dims else rows[None]
    count = len(rows)

    k = inverse_cdf(lengths, n, draw).flip(0)
    position = count - 1 - draw.rank  # of each sample among the falling ks
    order = inverse(position)

    starts = sorted({n * block // blocks for block in range(blocks)})
    widths = [end - start for start, end in zip(starts, [*starts[1:], n], strict=True)]
    counts = tuple(draw.most_above(lengths, n, start) for start in starts)
    parts = []
    for start, width, rows_b, into_b, weight2_b in zip(
        starts,
        widths,
        first_rows(permute(rows, order, position), counts),
        zip(*(_split(affine, widths) for affine in into), strict=True),
        weight2.split(widths, dim=1),
        strict=True,
    ):
        hidden = hidden_features(rows_b, into_b, activation)  # (count, ..., width)
        k_b = (k[: len(rows_b)] - start).clamp(0, width)
        hidden = zero_tail(hidden, spread(k_b, hidden, (0,)), hidden.ndim - 1, inplace=False)
        parts.append(linear(hidden, weight2_b))
    output = permute(sum_of_rows(tuple(parts), count), position, order)
    output = output if bias2 is None else output + bias2.to(output.dtype)
    output = output.unflatten(0, samples) if batch_dims else output[0]
    return output.movedim(leading, batch_dims), k.gather(0, position).view(samples)


def _split(affine: Affine, widths: list[int]) -> list[Affine]:
    """By its output features."""
    weight, bias = affine
    biases = [None] * len(widths) if bias is None else bias.split(widths)
    return list(zip(weight.split(widths), biases, strict=True))
