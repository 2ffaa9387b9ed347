"""Linear layers that read a prefix: one for each sample, and all at once."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from ..draws import draw
from ..lengths import Lengths, check_lengths, lengths_or_exponential
from .checks import check_droppable, check_k, resolve_dims, spread
from .prefix import zero_tail
from .shards import check_whole_linear

Scale = Literal["sqrt"] | None


def tail_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail_bias: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    batch_dim: int | Sequence[int] = 0,
    *,
    lengths: Lengths | None = None,
    stratified: bool = True,
    scale: Scale = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`linear(tail_dropout(input), weight, bias)`, and a further bias for the k of each sample.

    In training a fresh k is drawn for each index of `batch_dim`. Where features are dropped, k < n,
    the row k of `tail_bias` is added: it can learn what the tail would have added on average. With
    `training=False` it is `linear(input, weight, bias)`.

    Args:
        input: `(..., n)`.
        weight: `(out_features, n)`.
        bias: `(out_features,)`, or None.
        tail_bias: `(n, out_features)`.
        p: expected fraction of features dropped, E[1 - k/n], in [0, 1]; not used if `lengths` is
            given.
        training: whether to drop.
        batch_dim: the dim, or dims, of the input whose every index draws its own k.
        lengths: distribution of k. None: `Exponential(p)`.
        stratified: spread the ks of one call evenly over their distribution.
        scale: "sqrt" multiplies the prefix by sqrt(n/k), so that sums over it keep their size
            where features are independent. None: nothing is rescaled.
        generator: source of randomness, torch's global one by default.

    Returns:
        Shape `(..., out_features)`.

    Raises:
        ValueError: p outside [0, 1] or NaN, shapes that do not fit, another word for `scale`.
        IndexError: a dim that the input does not have.
        TypeError: lengths without a pmf, dims that are no ints.

    Example:
        >>> from taildropout.lengths import Sizes
        >>> x, weight = torch.ones(1, 3), torch.tensor([[1.0, 10.0, 100.0]])
        >>> tail_bias = torch.tensor([[0.1], [0.2], [0.3]])
        >>> tail_linear(x, weight, None, tail_bias, lengths=Sizes([2]))  # 1 + 10 + 0.3
        tensor([[11.3000]])
    """
    lengths = lengths_or_exponential(lengths, p)
    check_scale(scale)
    if not training:
        return linear(input, weight, bias)
    check_shapes(input, weight, tail_bias)
    if len(tail_bias) > weight.shape[1]:  # only a narrowed layer has more rows
        raise _do_not_fit(input, weight, tail_bias)
    check_droppable(input)
    batch_dims, dim = resolve_dims(input, batch_dim, -1)
    samples = [input.shape[d] for d in batch_dims]
    k = draw(
        lengths,
        input.shape[dim],
        math.prod(samples),
        stratified=stratified,
        device=input.device,
        generator=generator,
    ).view(samples)
    return linear_at(spread(k, input, batch_dims), input, weight, bias, tail_bias, scale)


def linear_at(
    k: int | Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail_bias: Tensor,
    scale: Scale,
) -> Tensor:
    """`tail_linear` at a k: an int, or a tensor that broadcasts against the input."""
    check_shapes(input, weight, tail_bias)
    check_whole_linear(input, weight, tail_bias)
    n = len(tail_bias)
    if isinstance(k, int):  # one for all: the tail need not be read
        prefix = input[..., :k]
        prefix = prefix if scale is None else prefix * factor_of(k, n)
        output = linear(prefix, weight[:, :k], bias)
        return output if k == n else output + tail_bias[k].to(output.dtype)
    k = k.to(input.device)
    prefix = zero_tail(input, k, -1, inplace=False)
    prefix = prefix if scale is None else (prefix * factors_of(k, n, input.dtype)).to(input.dtype)
    return with_tail_bias(linear(prefix, weight, bias), k, tail_bias)


def with_tail_bias(output: Tensor, k: Tensor, tail_bias: Tensor) -> Tensor:
    """The output, and for each k < n its row; k broadcasts against the output."""
    n = len(tail_bias)
    if n == 0:
        return output
    k = k.squeeze(-1) if k.ndim else k  # (...)
    rows = embedding(k.clamp(max=n - 1), tail_bias)  # (..., out_features)
    rows = torch.where((k < n).unsqueeze(-1), rows, rows.new_zeros(()))
    return output + rows.to(output.dtype)


def factor_of(k: int, n: int) -> float:
    """What the scale "sqrt" multiplies a prefix by; an empty one may be left as it is."""
    return math.sqrt(n / k) if k else 1.0


def factors_of(k: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """`factor_of` of each k, in float32 at least."""
    factors = (n / k.clamp(min=1).double()).sqrt().clamp(min=1)
    return factors.to(torch.promote_types(dtype, torch.float32))


def check_shapes(input: Tensor, weight: Tensor, tail_bias: Tensor) -> None:
    """Of a narrowed layer fewer features arrive than `tail_bias` has rows."""
    n = input.shape[-1] if input.ndim else None
    fits = weight.ndim == 2 and weight.shape[1] == n and tail_bias.ndim == 2
    if not fits or tail_bias.shape[1] != len(weight) or len(tail_bias) < weight.shape[1]:
        raise _do_not_fit(input, weight, tail_bias)


def _do_not_fit(input: Tensor, weight: Tensor, tail_bias: Tensor) -> ValueError:
    return ValueError(
        "input (..., n), weight (out_features, n) and tail_bias (n, out_features) must fit, got "
        f"{tuple(input.shape)}, {tuple(weight.shape)} and {tuple(tail_bias.shape)}"
    )


def check_scale(scale: Scale) -> Scale:
    if scale not in (None, "sqrt"):
        raise ValueError(f'scale must be "sqrt" or None, got {scale!r}')
    return scale


def prefix_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ks: Iterable[int] | Tensor | None = None,
) -> Tensor:
    """`linear(keep_prefix(input, k), weight, bias)` for every k, for the price of about one.

    The outputs for two ks differ by the features between them, so all are one running sum. It
    is kept in float32 at least. Beside the result it takes as much memory once more.

    Args:
        input: `(..., n)`.
        weight: `(out_features, n)`.
        bias: `(out_features,)`, or None.
        ks: prefix lengths in 0, ..., n, in any order. None: all of them, 0, ..., n.

    Returns:
        Shape `(len(ks), ..., out_features)`, in the order of `ks`.

    Raises:
        ValueError: a k outside 0, ..., n, no k, shapes that do not fit.
        TypeError: a k is not an integer.

    Example:
        >>> input, weight = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]])
        >>> prefix_linear(input, weight).flatten()
        tensor([  0.,   1.,  21., 321.])
    """
    n = input.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != n:
        raise ValueError(
            f"weight must have shape (out_features, {n}) for an input of shape "
            f"{tuple(input.shape)}, got {tuple(weight.shape)}"
        )
    asked = range(n + 1) if ks is None else [int(check_k(k)) for k in ks]
    if not asked or min(asked) < 0 or max(asked) > n:
        raise ValueError(f"ks must be at least one k in 0, ..., n={n}, got {list(asked)}")
    ends = sorted(set(asked))
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    dtype = torch.promote_types(input.dtype, torch.float32)
    leading = input.shape[:-1]
    rows = input[..., : ends[-1]].reshape(math.prod(leading), ends[-1]).to(dtype)
    columns = weight[:, : ends[-1]].to(dtype).T
    total = rows.new_zeros(len(rows), len(weight))
    total = total if bias is None else total + bias.to(dtype)
    totals = []
    with torch.autocast(rows.device.type, enabled=False):  # which would add up in low precision
        for rows_b, columns_b in zip(rows.split(widths, 1), columns.split(widths), strict=True):
            total = torch.addmm(total, rows_b, columns_b)
            totals.append(total)
    result = torch.stack(totals).to(input.dtype).view(len(ends), *leading, len(weight))
    if list(asked) == ends:
        return result
    index = torch.tensor([ends.index(k) for k in asked], device=input.device)
    return result.index_select(0, index)


def expected_mse(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: Lengths,
    bias: Tensor | None = None,
) -> Tensor:
    """The expectation over k of `mse_loss(linear(prefix of hidden), target)`, without sampling.

    A loss for training linear decoders on all prefixes at once, with no noise from drawing k, and
    the exact value that the mean over draws converges to. With s_j = P(K >= j) the expected
    squared error of one sample is |y|^2 - 2 y'W (s * h) + h' [(W'W) * S] h, S_ij = s_max(i, j),
    in time quadratic in n.

    Args:
        hidden: the features, `(..., n)`.
        weight: of the decoder, `(out_features, n)`.
        target: `(..., out_features)`.
        lengths: distribution of k.
        bias: of the decoder, `(out_features,)`, or None.

    Returns:
        The mean over all samples and outputs, a scalar.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: lengths without a pmf.

    Example:
        >>> from taildropout.lengths import Uniform
        >>> hidden, weight = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 4.0]])
        >>> expected_mse(hidden, weight, torch.tensor([[6.0]]), Uniform())  # of 16 and of 0
        tensor(8.)

    Source: Bao, Lucas, Sachdeva and Grosse, Regularized linear autoencoders recover the principal
    components, eventually (2020), arXiv 2007.06731, on nested dropout.
    """
    n, outputs = hidden.shape[-1], target.shape[-1]
    if weight.shape != (outputs, n) or hidden.shape[:-1] != target.shape[:-1]:
        raise ValueError(
            "hidden (..., n), weight (out_features, n) and target (..., out_features) must fit, "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        )
    samples = math.prod(hidden.shape[:-1])
    hidden, target = hidden.reshape(samples, n), target.reshape(samples, outputs)
    target = target if bias is None else target - bias
    pmf = check_lengths(lengths).pmf(n)
    reached = pmf.flip(0).cumsum(0).flip(0)[1:].to(hidden)  # P(K >= j), j = 1, ..., n
    both = torch.minimum(reached[:, None], reached)
    single = ((target @ weight) * hidden * reached).sum()
    double = ((weight.T @ weight) * (hidden.T @ hidden) * both).sum()
    return (target.square().sum() - 2 * single + double) / target.numel()
