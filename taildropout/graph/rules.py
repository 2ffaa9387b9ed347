"""What is known of each operation: one entry in a table.

Each operation states `Relation`s between a dim of one value and a dim of another, what it `Read`s,
and what it makes of constants. What is not in the table mixes features, or is unknown: its inputs
are needed whole, and so is its output. A new operation is a new entry, and a case in the tests.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import moving
from .constants import (
    Transfer,
    all_of,
    all_of_argument,
    by_choice,
    by_evaluation,
    from_related,
    of_channels,
    of_halves,
    of_layer,
    padded,
    zeros_from_any,
    zeros_from_any_factor,
    zeros_from_related,
)
from .dataflow import Dataflow, Operation, count_of, layer_dim
from .exports import LAYER, shape
from .moving import Taken
from .norms import Norms
from .relations import Relation, Saying, dims_alike, read, related, same

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """All that is known of one operation.

    Attributes:
        says: how its features belong together.
        constants: what it makes of features that are constant.
        fold: what constants add to each of its outputs, given the entries of its weight times
            them; None where that differs from place to place. Of what has no `fold`, only zeros
            can be taken away.
        takes: along which dims it takes features, and which, by numbers that stand in the code.
        has_sizes: sizes of its input or output stand among its arguments.
        runs_on_nothing: torch can run it where all features are gone.
        alignment: its features must be a multiple of so many bytes.
        mixes: why it needs all features of the dims of which it says nothing.
    """

    says: Callable[[Operation], Iterable[Saying]]
    constants: Transfer | None = None
    fold: Callable[[Operation, Tensor], Tensor | None] | None = None
    takes: Callable[[Operation], dict[int, Taken]] | None = None
    has_sizes: bool = False
    runs_on_nothing: bool = False
    alignment: int = 1
    mixes: str = "needs all features at once, or is not supported"


def rule_of(operation: Operation) -> Rule | None:
    """The entry of an operation. Elementwise functions are known by torch's tag for them."""
    rule = RULES.get(operation.target) or BY_NAME.get(str(operation.target))
    return rule or (ELEMENTWISE if is_known(operation.target) else None)


def is_known(target: Any) -> bool:
    is_pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return target in RULES or str(target) in BY_NAME or is_pointwise


class Sayings:
    """What all operations say, asked once; of the layers, at the given ks."""

    def __init__(self, norms: Norms) -> None:
        self._norms = norms
        self._said: dict[Operation, tuple[Saying, ...]] = {}

    def at(self, ks: dict[str, int]) -> Callable[[Operation], tuple[Saying, ...]]:
        of_layers: dict[Operation, tuple[Saying, ...]] = {}

        def say(operation: Operation) -> tuple[Saying, ...]:
            is_layer = operation.target is LAYER
            said = of_layers if is_layer else self._said
            if operation not in said:
                rule = rule_of(operation)
                found = _layer(operation, ks) if is_layer else rule.says(operation) if rule else ()
                said[operation] = (*found, *self._norms.say(operation))
            return said[operation]

        return say


# ------------------------------------------------------------------------------- what they say


def _layer(operation: Operation, ks: dict[str, int]) -> Iterator[Saying]:
    """It needs no tail, and brings forth zeros by itself."""
    input, output, dim = operation.args[0], operation.output, layer_dim(operation)
    yield from dims_alike(input, output, [d for d in range(len(shape(output))) if d != dim])
    n, out_n, k = count_of((input, dim)), count_of((output, dim)), ks.get(operation.args[1])
    if n is None and out_n is not None:  # a fitted layer, which takes any number from outside
        yield Relation((output, dim), ())
    if n is not None and out_n is not None:
        before, after = torch.arange(n), torch.arange(out_n)
        if k is not None:
            before, after = before.masked_fill(before >= k, -1), after.masked_fill(after >= k, -1)
        yield related((input, dim), (output, dim), before, after)


def _elementwise(operation: Operation) -> Iterator[Saying]:
    output = operation.output
    for source in operation.sources:
        missing = len(shape(output)) - len(shape(source))
        # Where the sizes differ, one entry is for all.
        yield from dims_alike(source, output, {d: d + missing for d in range(len(shape(source)))})


def _in_eval(training_at: int) -> Callable[[Operation], Iterator[Saying]]:
    """Functions that are random in training."""

    def says(operation: Operation) -> Iterator[Saying]:
        if operation.arg(training_at, "training", False) is False:
            yield from _elementwise(operation)

    return says


def _linear(operation: Operation) -> Iterator[Saying]:
    input, weight = operation.args[:2]
    bias = operation.arg(2, "bias")
    last, out_last = len(shape(input)) - 1, len(shape(operation.output)) - 1
    yield from read(operation, (input, last), (weight, 1), bias)
    yield from same((weight, 0), (operation.output, out_last))
    if bias is not None:
        yield from same((bias, 0), (operation.output, out_last))
    yield from dims_alike(input, operation.output, range(last))


def _convolution(transposed: bool) -> Callable[[Operation], Iterator[Saying]]:
    def says(operation: Operation) -> Iterator[Saying]:
        input, weight = operation.args[:2]
        bias, output = operation.arg(2, "bias"), operation.output
        groups = operation.arg(6, "groups", 1)
        dim = len(shape(input)) - (len(shape(weight)) - 2) - 1  # 0 where there is no batch dim
        if not transposed:
            yield from same((weight, 0), (output, dim))
        if groups == 1:
            yield from read(operation, (input, dim), (weight, 0 if transposed else 1), bias)
            if transposed:
                yield from same((weight, 1), (output, dim))
        else:  # whole groups go
            ins, outs = (torch.arange(count_of((v, dim)) or 0) for v in (input, output))
            in_group = ins // (len(ins) // groups)
            out_group = outs // (len(outs) // groups)
            yield related((input, dim), (output, dim), in_group, out_group)
            if transposed:
                yield from same((input, dim), (weight, 0))
        if bias is not None:
            yield from same((bias, 0), (output, dim))
        yield from dims_alike(input, output, range(dim))

    return says


def _product(left_at: int, right_at: int, bias_at: int | None = None) -> Callable[[Operation], Any]:
    """A matrix product of values; the right one may be a weight of shape (in, out)."""

    def says(operation: Operation) -> Iterator[Saying]:
        left, right = operation.args[left_at], operation.args[right_at]
        bias = None if bias_at is None else operation.args[bias_at]
        output = operation.output
        rank, rank_right, rank_out = (len(shape(value)) for value in (left, right, output))
        if rank < 2 or rank_right < 2:
            return
        yield from read(operation, (left, rank - 1), (right, rank_right - 2), bias)
        yield from read(operation, (right, rank_right - 2), (left, rank - 1))
        yield from same((left, rank - 2), (output, rank_out - 2))
        yield from same((right, rank_right - 1), (output, rank_out - 1))
        if bias is not None:
            yield from same((bias, len(shape(bias)) - 1), (output, rank_out - 1))
        for factor, its_rank in ((left, rank), (right, rank_right)):
            shift = rank_out - its_rank
            yield from dims_alike(factor, output, {d: d + shift for d in range(its_rank - 2)})

    return says


def _grouped_product(operation: Operation) -> Iterator[Saying]:
    """Rows of the input, group by group, times a matrix for each group: (groups, in, out)."""
    input, weight = operation.args[:2]
    if (len(shape(input)), len(shape(weight))) == (2, 3) and operation.arg(3, "bias") is None:
        yield from read(operation, (input, 1), (weight, 1))
        yield from same((weight, 2), (operation.output, 1))


def _einsum(operation: Operation) -> Iterator[Saying]:
    """Without diagonals or an ellipsis, and with each sum over two factors at most."""
    equation, factors = operation.args[:2]
    written, arrow, result = equation.replace(" ", "").partition("->")
    terms = written.split(",")
    if any(len(set(term)) < len(term) for term in terms):  # also of the dots of an ellipsis
        return
    if not arrow:
        letters = written.replace(",", "")
        result = "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    for letter in sorted(set("".join(terms))):
        places = [(f, t.index(letter)) for f, t in zip(factors, terms, strict=True) if letter in t]
        if letter in result:
            for place in places:
                yield from same(place, (operation.output, result.index(letter)))
        elif len(places) == 1:
            yield from read(operation, places[0])
        elif len(places) == 2:
            one, other = places
            yield from read(operation, one, other)
            yield from read(operation, other, one)


def _bilinear(operation: Operation) -> Iterator[Saying]:
    """Each feature of one input times each of the other, weighted: (out, one, other)."""
    one, other, weight = operation.args[:3]
    bias, last = operation.arg(3, "bias"), len(shape(operation.output)) - 1
    yield from read(operation, (one, last), (weight, 1))
    yield from read(operation, (other, last), (weight, 2))
    yield from same((weight, 0), (operation.output, last))
    if bias is not None:
        yield from same((bias, 0), (operation.output, last))
    for source in (one, other):
        yield from dims_alike(source, operation.output, range(last))


def _embedding(operation: Operation) -> Iterator[Saying]:
    if operation.pick in (None, 0):
        weight, output = operation.args[0], operation.output
        yield from same((weight, 1), (output, len(shape(output)) - 1))


def _cell(weights_at: int) -> Callable[[Operation], Iterator[Saying]]:
    """One step. Its input weights lose columns; its outputs are computed all or none."""

    def says(operation: Operation) -> Iterator[Saying]:
        input, weight = operation.args[0], operation.args[weights_at]
        bias = operation.arg(weights_at + 2)
        yield from read(operation, (input, len(shape(input)) - 1), (weight, 1), bias)

    return says


def _recurrent(operation: Operation) -> Iterator[Saying]:
    """Its input weights lose columns; its outputs are computed all or none."""
    input, weights = operation.args[0], operation.args[2]
    has_biases, layers = operation.args[3], operation.args[4]
    directions = 2 if operation.args[7] else 1
    of_one_direction = len(weights) // (layers * directions)
    for direction in range(directions):  # of the first layer
        first = direction * of_one_direction
        bias = weights[first + 2] if has_biases else None
        yield from read(operation, (input, len(shape(input)) - 1), (weights[first], 1), bias)


def _all_but(mixed: Callable[[Operation, int], Iterable[int]]) -> Callable[[Operation], Any]:
    """Treats the dims that it does not mix entry by entry; `mixed(operation, rank)` of its input."""

    def says(operation: Operation) -> Iterator[Saying]:
        if operation.pick not in (None, 0):
            return
        input = operation.args[0]
        rank = len(shape(input))
        gone = {d % rank for d in mixed(operation, rank)} if rank else set()
        dims = {d: d for d in range(rank) if d not in gone}
        if len(shape(operation.output)) < rank:  # they are reduced, not kept with size 1
            dims = {d: d - sum(g < d for g in gone) for d in dims}
        yield from dims_alike(input, operation.output, dims)

    return says


def _last(count: int) -> Callable[[Operation, int], Iterable[int]]:
    return lambda operation, rank: range(rank - count, rank)


def _dim_argument(position: int) -> Callable[[Operation, int], Iterable[int]]:
    return lambda operation, rank: [operation.arg(position, "dim", -1)]


def _normalised(operation: Operation, rank: int) -> Iterable[int]:
    return range(rank - len(operation.args[1]), rank)


def _dims_argument(position: int) -> Callable[[Operation, int], Iterable[int]]:
    """None or none at all: all dims."""

    def mixed(operation: Operation, rank: int) -> Iterable[int]:
        given: Any = operation.arg(position, "dim")
        return [given] if isinstance(given, int) else given or range(rank)

    return mixed


def _summing(dims_at: int) -> Callable[[Operation], Iterator[Saying]]:
    """Features that are added up as they are, or by their magnitude: zeros add nothing."""
    mixed = _dims_argument(dims_at)

    def says(operation: Operation) -> Iterator[Saying]:
        yield from _all_but(mixed)(operation)
        order = operation.arg(1, "ord", 2)
        if operation.target is aten.linalg_vector_norm.default and not 0 < order < float("inf"):
            return
        rank = len(shape(operation.args[0]))
        for dim in sorted({d % rank for d in mixed(operation, rank)} if rank else ()):
            yield from read(operation, (operation.args[0], dim))

    return says


def _channelwise(operation: Operation) -> Iterator[Saying]:
    """Parameters and statistics lie along dim 1."""
    if operation.pick not in (None, 0) or len(shape(operation.args[0])) < 2:
        return
    yield from dims_alike(operation.args[0], operation.output, [0, 1])
    for source in operation.sources[1:]:
        if len(shape(source)) == 1:
            yield from same((source, 0), (operation.output, 1))


def _weight_norm(operation: Operation) -> Iterator[Saying]:
    if operation.arg(2, "dim", 0) == 0:
        for source in operation.args[:2]:
            yield from same((source, 0), (operation.output, 0))


def _attention(operation: Operation) -> Iterator[Saying]:
    """Over the last two dims; those before are treated entry by entry, heads among them.

    Of heads that share keys and values, as many in a row have the same.
    """
    output = operation.output
    for source in operation.sources:
        shift = len(shape(output)) - len(shape(source))
        dims = range(len(shape(source)) - 2)
        yield from dims_alike(source, output, {d: d + shift for d in dims})
    heads = len(shape(output)) - 3
    if heads < 0 or not operation.arg(7, "enable_gqa", False):
        return
    for shared in dict.fromkeys(operation.args[1:3]):
        n, groups = count_of((output, heads)), count_of((shared, len(shape(shared)) - 3))
        if n is not None and groups and n != groups and n % groups == 0:
            labels = torch.arange(n) // (n // groups)
            place = (shared, len(shape(shared)) - 3)
            yield related(place, (output, heads), torch.arange(groups), labels)


def _glu(operation: Operation) -> Iterator[Saying]:
    input, output = operation.args[0], operation.output
    rank = len(shape(input))
    along = operation.arg(1, "dim", -1) % rank
    yield from dims_alike(input, output, [d for d in range(rank) if d != along])
    half = count_of((output, along))
    if half is not None:
        halves = torch.arange(2 * half) % half
        yield related((input, along), (output, along), halves, torch.arange(half))


def _cosine_similarity(operation: Operation) -> Iterator[Saying]:
    input, other = operation.args[:2]
    rank = len(shape(input))
    along = operation.arg(2, "dim", 1) % rank
    if len(shape(other)) != rank or shape(input)[along] != shape(other)[along]:
        return
    yield from same((input, along), (other, along))
    for source in dict.fromkeys((input, other)):
        yield from read(operation, (source, along))
        dims = {d: d - (d > along) for d in range(rank) if d != along}
        yield from dims_alike(source, operation.output, dims)


def _nothing(operation: Operation) -> Iterator[Saying]:
    return iter(())


# ------------------------------------------------------------------ what constants add to outputs


def _as_they_are(operation: Operation, sums: Tensor) -> Tensor | None:
    return sums


def _over_the_kernel(operation: Operation, sums: Tensor) -> Tensor | None:
    """Of a convolution, (out, *kernel): the same everywhere only where no window meets a border."""
    padding = operation.arg(4, "padding", 0)
    unpadded = padding == "valid" or not any(padding if isinstance(padding, list) else [padding])
    return sums.flatten(1).sum(1) if unpadded else None


def _at_each_place_of_the_kernel(operation: Operation, sums: Tensor) -> Tensor | None:
    """Of a transposed convolution, (out, *kernel): each output comes from one place of the kernel.

    Only where the windows neither overlap nor leave gaps, and all places of the kernel are alike.
    Padding takes away outputs at the border, and leaves the others as they are.
    """
    kernel = list(sums.shape[1:])

    def given(position: int, name: str, default: int) -> list[int]:
        value = operation.arg(position, name, default)
        value = list(value) if isinstance(value, list | tuple) else [value]
        return value * len(kernel) if len(value) == 1 else value

    zeros, ones = [0] * len(kernel), [1] * len(kernel)
    apart = (
        given(3, "stride", 1) == kernel
        and given(5, "output_padding", 0) == zeros
        and given(7, "dilation", 1) == ones
    )
    places = sums.flatten(1)
    alike = torch.allclose(places, places[:, :1].expand_as(places), rtol=1e-12, atol=1e-14)
    return places[:, 0] if apart and alike else None


# --------------------------------------------------------------------------------- of constants


def _of_grouped_convolution(operation: Operation, dim: int, facts: Any) -> Any:
    """Zeros make the bias; at padded borders too."""
    bias = operation.arg(2, "bias")
    if dim != 1:
        return None
    known = zeros_from_any(0)(operation, dim, facts)
    if known is None or bias is None:
        return known
    of_bias = facts.at((bias, 0))
    return type(known).of(known.mask & of_bias.mask, of_bias.value.masked_fill(~known.mask, 0))


def _unpadded(padding_at: int) -> Transfer:
    """A mean over windows: of what is at the border too, only if there is none."""

    def transfer(operation: Operation, dim: int, facts: Any) -> Any:
        padding = operation.arg(padding_at, "padding", 0)
        divisor = operation.arg(padding_at + 3, "divisor_override")
        plain = not any(padding if isinstance(padding, list | tuple) else [padding])
        of_all = plain and divisor is None
        return (from_related if of_all else zeros_from_related)(operation, dim, facts)

    return transfer


def _of_normalised_zeros(operation: Operation, dim: int, facts: Any) -> Any:
    """Along other dims: zeros make the bias, where that is one number."""
    known = facts.at((operation.args[0], dim))
    bias = operation.arg(3, "bias")
    value = 0.0 if bias is None else facts.uniform(bias)
    if value is None or dim in _normalised(operation, len(shape(operation.output))):
        return None
    return type(known).of(known.zero, torch.full_like(known.value, value))


def _of_statistics(operation: Operation, dim: int, facts: Any) -> Any:
    """Instance normalisation, each channel by its own mean and variance: its bias is left."""
    if operation.arg(5, "use_input_stats", True) is not True:
        return of_channels(operation, dim, facts)
    known = facts.at((operation.args[0], dim)) if dim == 1 else None
    bias = operation.arg(2, "bias")
    if known is None:
        return None
    if bias is None:
        return type(known).of(known.mask, torch.zeros_like(known.value))
    of_bias = facts.at((bias, 0))
    return type(known).of(known.mask & of_bias.mask, of_bias.value)


# ------------------------------------------------------------------------------------ the table


def _each(operations: Iterable[Any], rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(operations, rule)


def _takes(taken: Callable[[Operation], dict[int, Taken]], **options: Any) -> Rule:
    return Rule(moving.take(taken), options.pop("constants", from_related), takes=taken, **options)


ELEMENTWISE = Rule(_elementwise, by_evaluation(), runs_on_nothing=True)
_VIEW = Rule(moving.reshape, from_related, has_sizes=True)
_REARRANGED = Rule(moving.rearrange, from_related)
_CONVOLUTION = Rule(_convolution(transposed=False), _of_grouped_convolution, _over_the_kernel)
_TRANSPOSED = Rule(
    _convolution(transposed=True), _of_grouped_convolution, _at_each_place_of_the_kernel
)
_GROUPED_PRODUCT = Rule(_grouped_product, alignment=16)
_CELL = Rule(_cell(weights_at=2), fold=_as_they_are)

RULES: dict[Any, Rule] = {
    LAYER: Rule(_nothing, of_layer, runs_on_nothing=True),  # its k says the rest: `Sayings`
    # Elementwise, with something more to say, or without torch's tag in one of its versions.
    aten.mul.Tensor: Rule(_elementwise, by_evaluation(0, 1), runs_on_nothing=True),
    aten.multiply.Tensor: Rule(_elementwise, by_evaluation(0, 1), runs_on_nothing=True),
    aten.div.Tensor: Rule(_elementwise, by_evaluation(0), runs_on_nothing=True),
    aten.divide.Tensor: Rule(_elementwise, by_evaluation(0), runs_on_nothing=True),
    aten.true_divide.Tensor: Rule(_elementwise, by_evaluation(0), runs_on_nothing=True),
    aten.where.self: Rule(_elementwise, by_choice(1, 2), runs_on_nothing=True),
    aten.masked_fill.Scalar: Rule(_elementwise, by_choice(0, 2), runs_on_nothing=True),
    aten.masked_fill.Tensor: Rule(_elementwise, by_choice(0, 2), runs_on_nothing=True),
    aten.dropout.default: Rule(_in_eval(training_at=2), by_evaluation(), runs_on_nothing=True),
    aten.feature_dropout.default: Rule(_in_eval(2), by_evaluation(), runs_on_nothing=True),
    aten.alpha_dropout.default: Rule(_in_eval(2), by_evaluation(), runs_on_nothing=True),
    aten.rrelu.default: Rule(_in_eval(training_at=3), by_evaluation(), runs_on_nothing=True),
    **_each(
        (
            *(aten.leaky_relu.default, aten.hardswish.default, aten.log_sigmoid.default),
            *(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar),
            *(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device),
            *(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default),
            *(aten.lift_fresh_copy.default, aten.type_as.default, aten.to.other),
            *(aten.subtract.Tensor, aten.absolute.default, aten.negative.default),
            *(aten.square.default, aten.silu.default, aten.softplus.default),
        ),
        ELEMENTWISE,
    ),
    aten.zeros_like.default: Rule(_elementwise, all_of(0.0), runs_on_nothing=True),
    aten.ones_like.default: Rule(_elementwise, all_of(1.0), runs_on_nothing=True),
    aten.full_like.default: Rule(_elementwise, all_of_argument(1), runs_on_nothing=True),
    aten.zeros.default: Rule(moving.fill, all_of(0.0), has_sizes=True),
    aten.ones.default: Rule(moving.fill, all_of(1.0), has_sizes=True),
    aten.full.default: Rule(moving.fill, all_of_argument(1), has_sizes=True),
    # Products.
    aten.linear.default: Rule(_linear, fold=_as_they_are, runs_on_nothing=True),
    aten.addmm.default: Rule(_product(1, 2, bias_at=0), fold=_as_they_are),
    **_each(
        (aten.matmul.default, aten.mm.default, aten.bmm.default),
        Rule(_product(0, 1), zeros_from_any(0, 1), _as_they_are),
    ),
    aten.einsum.default: Rule(_einsum, zeros_from_any_factor),
    aten.bilinear.default: Rule(_bilinear),
    **_each(
        (
            getattr(getattr(aten, f"conv{d}d"), how)
            for d in (1, 2, 3)
            for how in ("default", "padding")
        ),
        _CONVOLUTION,
    ),
    **_each(
        (
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        _TRANSPOSED,
    ),
    **_each(
        (
            aten.embedding.default,
            aten.embedding_bag.default,
            aten.embedding_bag.padding_idx,
            aten._embedding_bag.default,
            aten._embedding_bag_forward_only.default,
        ),
        Rule(_embedding),
    ),
    **_each(
        (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
        Rule(_recurrent, fold=_as_they_are),
    ),
    **_each(
        (
            aten.lstm_cell.default,
            aten.gru_cell.default,
            aten.rnn_tanh_cell.default,
            aten.rnn_relu_cell.default,
        ),
        _CELL,
    ),
    aten.scaled_dot_product_attention.default: Rule(_attention, zeros_from_any(2)),
    # What only moves entries.
    **_each(
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
            aten.unflatten.int,
        ),
        _VIEW,
    ),
    aten.flatten.using_ints: Rule(moving.reshape, from_related),
    **_each(
        (
            *(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
            *(aten.numpy_T.default, aten.mT.default, aten.swapaxes.default, aten.movedim.intlist),
        ),
        _REARRANGED,
    ),
    aten.select.int: Rule(moving.take_away(1), from_related),
    aten.index.Tensor: Rule(moving.pick_rows, from_related),
    aten.unbind.int: Rule(moving.take_away(1), from_related),
    aten.expand.default: Rule(moving.expand, from_related, has_sizes=True),
    aten.cat.default: Rule(moving.concatenate, from_related),
    aten.stack.default: Rule(moving.stack, from_related),
    aten.slice.Tensor: _takes(moving.by_slice),
    aten.narrow.default: _takes(moving.by_narrow),
    aten.split.Tensor: _takes(moving.by_split, has_sizes=True),
    aten.split_with_sizes.default: _takes(moving.by_split_with_sizes, has_sizes=True),
    aten.chunk.default: _takes(moving.by_chunk),
    aten.index_select.default: _takes(moving.by_index),
    aten.roll.default: _takes(moving.by_roll),
    aten.flip.default: _takes(moving.by_flip),
    aten.channel_shuffle.default: _takes(moving.by_channel_shuffle),
    aten.repeat.default: _takes(moving.by_repeat),
    aten.repeat_interleave.self_int: _takes(moving.by_repeat_interleave),
    aten.constant_pad_nd.default: _takes(moving.by_constant_pad, constants=padded(2)),
    aten.pad.default: _takes(moving.by_pad, constants=padded(3)),
    **_each(
        (aten.pixel_shuffle.default, aten.pixel_unshuffle.default),
        Rule(moving.shuffle_pixels, from_related),
    ),
    # What mixes some dims, and treats the others entry by entry.
    **_each(
        (
            *(getattr(aten, f"upsample_nearest{d}d").vec for d in (1, 2, 3)),
            *(getattr(aten, f"_upsample_nearest_exact{d}d").vec for d in (1, 2, 3)),
            *(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec),
            *(aten.upsample_bicubic2d.vec, aten.upsample_trilinear3d.vec),
        ),
        Rule(_all_but(lambda operation, rank: range(2, rank)), from_related),
    ),
    **{
        getattr(aten, f"{name}{d}d").default: Rule(_all_but(_last(d)), from_related)
        for d in (1, 2, 3)
        for name in ("max_pool", "adaptive_avg_pool", "adaptive_max_pool")
    },
    aten.max_pool1d_with_indices.default: Rule(_all_but(_last(1)), from_related),
    aten.max_pool2d_with_indices.default: Rule(_all_but(_last(2)), from_related),
    aten.max_pool3d_with_indices.default: Rule(_all_but(_last(3)), from_related),
    aten._adaptive_avg_pool2d.default: Rule(_all_but(_last(2)), from_related),
    aten._adaptive_avg_pool3d.default: Rule(_all_but(_last(3)), from_related),
    **{
        getattr(aten, f"avg_pool{d}d").default: Rule(_all_but(_last(d)), _unpadded(3))
        for d in (1, 2, 3)
    },
    aten.layer_norm.default: Rule(
        _all_but(_normalised),
        _of_normalised_zeros,
        mixes="subtracts the mean over all n features, zeros among them",
    ),
    aten.rms_norm.default: Rule(_all_but(_normalised), zeros_from_any(0), has_sizes=True),
    aten.group_norm.default: Rule(_all_but(lambda operation, rank: range(1, rank))),
    **_each(
        (aten.mean.dim, aten.amax.default, aten.amin.default),
        Rule(_all_but(_dims_argument(1)), from_related),
    ),
    **_each(
        (aten.var.correction, aten.logsumexp.default, aten.mean.default),
        Rule(_all_but(_dims_argument(1))),
    ),
    aten.prod.dim_int: Rule(_all_but(_dims_argument(1)), zeros_from_related),
    aten.sum.default: Rule(_summing(1), zeros_from_related),
    aten.sum.dim_IntList: Rule(_summing(1), zeros_from_related),
    aten.linalg_vector_norm.default: Rule(_summing(2), zeros_from_related),
    **_each(
        (
            *(aten.softmax.int, aten._softmax.default),
            *(aten.log_softmax.int, aten._log_softmax.default),
        ),
        Rule(_all_but(_dim_argument(1))),
    ),
    aten.cumsum.default: Rule(_all_but(_dim_argument(1)), zeros_from_related),
    aten.glu.default: Rule(_glu, of_halves),
    aten.cosine_similarity.default: Rule(_cosine_similarity),
    **_each(
        (
            aten._native_batch_norm_legit_no_training.default,
            aten.batch_norm.default,
            aten.prelu.default,
            aten._prelu_kernel.default,
        ),
        Rule(_channelwise, of_channels),
    ),
    aten.instance_norm.default: Rule(_channelwise, _of_statistics),
    aten._weight_norm.default: Rule(_weight_norm),
}


# Operations that not every torch has, or that are there only once another package is imported.
BY_NAME = {
    "aten._grouped_mm.default": _GROUPED_PRODUCT,
    "transformers.grouped_mm_fallback.default": _GROUPED_PRODUCT,
}


def belongs_to_attention(flow: Dataflow, node: fx.Node) -> bool:
    """Whether it is a tensor of `nn.MultiheadAttention`, whose code wants all of one size."""
    for name in flow.names.get(node, []):
        owner, _, attribute = name.rpartition(".")
        if isinstance(flow.model.get_submodule(owner), nn.MultiheadAttention):
            return attribute not in ("k_proj_weight", "v_proj_weight")
    return False
