"""Pure tensor functions: what the layers compute."""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from . import cpu
from .lengths import Exponential, Lengths, draw, draw_ranked, probability_above
from .rows import first_rows, permute, sum_of_rows


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

    The backward pass needs k only: one integer per sample is saved, not a mask.

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
        TypeError: an integer or boolean input in training.

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
    if not training:
        _lengths(lengths, p)  # checks p
        return input
    output, _ = tail_dropout_with_k(
        input,
        p,
        batch_dim,
        dropout_dim,
        lengths=lengths,
        stratified=stratified,
        inplace=inplace,
        generator=generator,
    )
    return output


def tail_dropout_with_k(
    input: Tensor,
    p: float | Tensor,
    batch_dim: int | Sequence[int],
    dropout_dim: int,
    *,
    lengths: Lengths | None,
    stratified: bool,
    inplace: bool,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`tail_dropout` in training, and the k that it drew: one per index of the batch dims."""
    lengths = _lengths(lengths, p)
    if not (input.is_floating_point() or input.is_complex()):
        raise TypeError(
            "tail dropout in training needs a floating-point or complex input, got "
            f"{input.dtype}: convert it, call eval(), or fix k with set_k(k)"
        )
    batch_dims, dim = resolve_dims(input, batch_dim, dropout_dim)
    samples = [input.shape[d] for d in batch_dims]
    k = draw(
        lengths,
        input.shape[dim],
        math.prod(samples),
        stratified=stratified,
        device=input.device,
        generator=generator,
    ).view(samples)
    return _keep_prefix(input, _spread(k, input, batch_dims), dim, inplace), k


def _lengths(lengths: Lengths | None, p: float | Tensor) -> Lengths:
    if lengths is not None:
        return lengths
    if isinstance(p, Tensor) and not torch.compiler.is_compiling():
        p = p.item()
    return Exponential(p)  # type: ignore[arg-type]  # a tensor while compiling


def keep_prefix(input: Tensor, k: int | Tensor, dim: int = -1, *, inplace: bool = False) -> Tensor:
    """Keep the first k features along `dim` and zero the rest, in training and in eval alike.

    The kept features are bit for bit the input's. The others are zero, even where the input is
    NaN or Inf, and so is their gradient. Only k is saved for the backward pass.

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
    dim = _resolve_dim(input, dim, "dim")
    k = check_k(k)
    if not torch.compiler.is_compiling():
        check_k_at_most(largest_k(k), input.shape[dim])
    if isinstance(k, Tensor):
        k = _align_k(k, input, dim)
    return _keep_prefix(input, k, dim, inplace)


def keep_prefix_of_samples(
    input: Tensor,
    k: int | Tensor,
    batch_dim: int | Sequence[int],
    dropout_dim: int,
    *,
    largest_k: int,
    inplace: bool,
) -> Tensor:
    """`keep_prefix` with k indexed by the batch dims, in their order, and its maximum known."""
    if isinstance(k, int) or k.ndim == 0:
        dim = _resolve_dim(input, dropout_dim, "dropout_dim")
    else:
        batch_dims, dim = resolve_dims(input, batch_dim, dropout_dim)
        samples = tuple(input.shape[d] for d in batch_dims)
        if k.shape != samples:
            raise ValueError(
                f"k must have one entry for each index of batch_dim={batch_dim}, shape {samples}, "
                f"got shape {tuple(k.shape)} for an input of shape {tuple(input.shape)}"
            )
        k = _spread(k, input, batch_dims)
    if not torch.compiler.is_compiling():
        check_k_at_most(largest_k, input.shape[dim])
    return _keep_prefix(input, k, dim, inplace)


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
) -> Tensor:
    """`linear(tail_dropout(activation(linear(input))))`, without computing the tail.

    In training the rows are arranged by falling k and the hidden features are cut into blocks;
    each block is computed for those rows only whose k reaches it: a staircase, of about a
    fraction 1 - p of the two matrix products, forward and backward. The draws are stratified, so
    how many rows reach a block at most is known before drawing, and nothing waits for the device.
    Random state included, the result and all gradients are those of the three functions in turn.
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

    Returns:
        Shape `(..., out_features)`.

    Raises:
        ValueError: p outside [0, 1] or NaN, fewer than one block.
        IndexError: a dim that the input does not have.

    Example:
        >>> weight1, weight2 = torch.randn(64, 8), torch.randn(2, 64)
        >>> tail_mlp(torch.randn(32, 8), weight1, None, weight2, None, p=0.8).shape
        torch.Size([32, 2])
    """
    if not training:
        _lengths(lengths, p)  # checks p
        return linear(activation(linear(input, weight1, bias1)), weight2, bias2)
    output, _ = tail_mlp_with_k(
        input,
        weight1,
        bias1,
        weight2,
        bias2,
        p,
        batch_dim,
        activation=activation,
        lengths=lengths,
        blocks=blocks,
        generator=generator,
    )
    return output


def tail_mlp_with_k(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    p: float,
    batch_dim: int | Sequence[int],
    *,
    activation: Callable[[Tensor], Tensor],
    lengths: Lengths | None,
    blocks: int | None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`tail_mlp` in training, and the k that it drew: one per index of the batch dims."""
    lengths = _lengths(lengths, p)
    n = len(weight1)
    blocks = min(max(n // 256, 1), 16) if blocks is None else blocks
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    batch_dims, _ = resolve_dims(input, batch_dim, -1)
    leading = tuple(range(len(batch_dims)))
    rows = input.movedim(batch_dims, leading)
    samples = rows.shape[: len(batch_dims)]
    rows = rows.flatten(0, len(batch_dims) - 1) if batch_dims else rows[None]
    count = len(rows)

    k, rank = draw_ranked(lengths, n, count, device=input.device, generator=generator)
    k = k.flip(0)
    position = count - 1 - rank  # of each sample among the falling ks
    order = torch.empty_like(rank).scatter_(0, position, torch.arange(count, device=rank.device))

    starts = sorted({n * block // blocks for block in range(blocks)})
    widths = [end - start for start, end in zip(starts, [*starts[1:], n], strict=True)]
    # The slack is for rounding: one row too many costs little, one too few would be wrong.
    counts = tuple(
        min(count, math.ceil(count * probability_above(lengths, n, start) + 1e-6))
        for start in starts
    )
    biases = [None] * len(starts) if bias1 is None else bias1.split(widths)
    parts = []
    for start, width, rows_b, weight1_b, bias1_b, weight2_b in zip(
        starts,
        widths,
        first_rows(permute(rows, order, position), counts),
        weight1.split(widths),
        biases,
        weight2.split(widths, dim=1),
        strict=True,
    ):
        hidden = activation(linear(rows_b, weight1_b, bias1_b))  # (count, ..., width)
        k_b = (k[: len(rows_b)] - start).clamp(0, width)
        hidden = _keep_prefix(hidden, _spread(k_b, hidden, (0,)), hidden.ndim - 1, inplace=False)
        parts.append(linear(hidden, weight2_b))
    output = permute(sum_of_rows(tuple(parts), count), position, order)
    output = output if bias2 is None else output + bias2.to(output.dtype)
    output = output.unflatten(0, samples) if batch_dims else output[0]
    return output.movedim(leading, batch_dims), k.gather(0, position).view(samples)


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
    reached = lengths.pmf(n).flip(0).cumsum(0).flip(0)[1:].to(hidden)  # P(K >= j), j = 1, ..., n
    both = torch.minimum(reached[:, None], reached)
    single = ((target @ weight) * hidden * reached).sum()
    double = ((weight.T @ weight) * (hidden.T @ hidden) * both).sum()
    return (target.square().sum() - 2 * single + double) / target.numel()


def _spread(k: Tensor, input: Tensor, batch_dims: tuple[int, ...]) -> Tensor:
    """k, indexed by the batch dims in their order, with the input's number of dims."""
    if len(batch_dims) > 1:
        k = k.permute(sorted(range(k.ndim), key=lambda i: batch_dims[i]))
    shape = [1] * input.ndim
    for d in batch_dims:
        shape[d] = input.shape[d]
    return k.reshape(shape)


def _keep_prefix(input: Tensor, k: int | Tensor, dim: int, inplace: bool) -> Tensor:
    """`keep_prefix` for a checked k: an int, or a tensor that broadcasts against the input."""
    k = k.to(input.device) if isinstance(k, Tensor) else torch.tensor(k, device="cpu")
    if torch.compiler.is_compiling():  # the compiler fuses this, and saves k by itself
        output = _zero_where_not_kept(input, k, dim)
    else:
        output = _zero_tail(input, k, dim)
    return input.copy_(output) if inplace else output


def _zero_where_not_kept(input: Tensor, k: Tensor, dim: int) -> Tensor:
    n = input.shape[dim]
    position = torch.arange(n, device=input.device)
    position = position.view([n if d == dim else 1 for d in range(input.ndim)])
    output = torch.where(position < k, input, input.new_zeros(()))
    like_input = torch.empty_like(input)
    if output.stride() != like_input.stride():  # where may take its strides from the mask
        output = like_input.copy_(output)
    return output


def _zero_tail(input: Tensor, k: Tensor, dim: int) -> Tensor:
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
        return _zero_tail(grad, k, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (k,) = ctx.saved_tensors
        return _zero_tail(tangent, k, ctx.dim)

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
        return _zero_tail(input, k, dim + 1), 0


# autograd.Function looks the signature up in each call; it is quicker to find than to make.
_KeepPrefix.forward.__signature__ = inspect.signature(_KeepPrefix.forward)  # type: ignore[attr-defined]


def resolve_dims(
    input: Tensor, batch_dim: int | Sequence[int], dropout_dim: int
) -> tuple[tuple[int, ...], int]:
    """Both as non-negative dims of `input`, checked to be different ones."""
    given = (batch_dim,) if isinstance(batch_dim, int) else batch_dim
    dims = tuple(_resolve_dim(input, d, "batch_dim") for d in given)
    dim = _resolve_dim(input, dropout_dim, "dropout_dim")
    if dim in dims or len(set(dims)) < len(dims):
        raise ValueError(
            "batch_dim and dropout_dim must be different dims, got "
            f"batch_dim={batch_dim} and dropout_dim={dropout_dim} for an input of shape "
            f"{tuple(input.shape)}"
        )
    return dims, dim


def _resolve_dim(input: Tensor, dim: int, name: str) -> int:
    if not -input.ndim <= dim < input.ndim:
        raise IndexError(
            f"{name} must be a dim of the input, got {name}={dim} for an input of shape "
            f"{tuple(input.shape)}"
        )
    return range(input.ndim)[dim]


def check_k(k: int | Tensor) -> int | Tensor:
    """k itself, as an int or an integer tensor."""
    if isinstance(k, Tensor):
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


def _align_k(k: Tensor, input: Tensor, dim: int) -> Tensor:
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
