"""Linear layers on all prefixes at once."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..lengths import Lengths, check_lengths
from .checks import check_k


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
