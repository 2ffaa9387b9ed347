"""How operations treat features: which features of which values go or stay together.

Each operation states `Relation`s between a dim of one value and a dim of another. What is not
listed here mixes features, or is unknown: its inputs are needed whole, and so is its output.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from .dataflow import LAYER, Graph, Operation, layer_dim, shape
from .moving import move
from .relations import Read, Relation, Rules, related, same

aten = torch.ops.aten


def rules_of(graph: Graph, operation: Operation, ks: dict[str, int]) -> Rules:
    """All that is known of an operation; empty where it is not supported."""
    rules = Rules([], [], [])
    target = operation.target
    if target is LAYER:
        rules.relations += _layer(operation, ks)
    elif is_pointwise(operation):
        rules.relations += _pointwise(operation)
    elif target in _MOVING:
        move(operation, rules)
    elif target in _LINEAR:
        _linear(operation, rules)
    elif target in _CONV | _CONV_TRANSPOSE:
        _convolve(operation, rules)
    elif target is aten.addmm.default:
        bias, input, weight = operation.args[:3]
        _multiply(operation, rules, input, weight, bias)
    elif target in _MATMUL:
        _multiply(operation, rules, *operation.args[:2])
    elif target is aten.einsum.default:
        _multiply_as_written(operation, rules)
    elif target is aten.bilinear.default:
        _multiply_pairs(operation, rules)
    elif target in _EMBEDDING and operation.pick in (None, 0):
        weight = operation.args[0]
        rules.relations.append(
            same((weight, 1), (operation.output, len(shape(operation.output)) - 1))
        )
    elif target in _RECURRENT:
        _recur(operation, rules)
    elif target in _CELLS:
        _recur_once(operation, rules)
    elif operation.pick in (None, 0):
        rules.relations += _through(operation)
        rules.reads += _sums(operation)
    return rules


def is_pointwise(operation: Operation) -> bool:
    tags: Any = getattr(operation.target, "tags", ())
    if operation.target in _RANDOM_IN_TRAINING:
        return operation.arg(_RANDOM_IN_TRAINING[operation.target], False) is False
    if torch.Tag.nondeterministic_seeded in tags or operation.pick is not None:
        return False
    return bool(torch.Tag.pointwise in tags or operation.target in _POINTWISE_WITHOUT_TAG)


def runs_on_no_features(operation: Operation) -> bool:
    """Whether torch can run it where all features are gone."""
    return operation.target in _LINEAR or operation.target is LAYER or is_pointwise(operation)


def moves(operation: Operation) -> bool:
    """Whether it only puts entries to other places."""
    return operation.target in _MOVING


def zeros_make_zeros(operation: Operation, source: fx.Node) -> bool:
    """Whether zeros in this source make zeros, whatever finite and nonzero the others are."""
    if operation.target is aten.div.Tensor:
        return source is operation.args[0] and source is not operation.args[1]
    return operation.target in _PRODUCTS


def is_recurrent(operation: Operation) -> bool:
    return operation.target in _RECURRENT or operation.target in _CELLS


def takes_by_number(operation: Operation) -> bool:
    """Whether it takes features by their position, which is written in the model's code."""
    return operation.target in _TAKING


def has_sizes(operation: Operation) -> bool:
    """Whether sizes of its input or output stand among its arguments."""
    return operation.target in _SIZED


_LINEAR = {aten.linear.default}
_CONV = {
    getattr(getattr(aten, f"conv{d}d"), overload)
    for d in (1, 2, 3)
    for overload in ("default", "padding")
}
_CONV_TRANSPOSE = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_MATMUL = {aten.matmul.default, aten.mm.default, aten.bmm.default}
_PRODUCTS = _MATMUL | {aten.mul.Tensor, aten.einsum.default}
_EMBEDDING = {
    aten.embedding.default,
    aten.embedding_bag.default,
    aten.embedding_bag.padding_idx,
    aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
}
# Where their list of weights and biases stands among the arguments.
_RECURRENT = {
    aten.lstm.input: 2,
    aten.gru.input: 2,
    aten.rnn_tanh.input: 2,
    aten.rnn_relu.input: 2,
}
# Where their weights and biases stand: of the input, then of the hidden state.
_CELLS = {
    aten.lstm_cell.default: 2,
    aten.gru_cell.default: 2,
    aten.rnn_tanh_cell.default: 2,
    aten.rnn_relu_cell.default: 2,
}
_POINTWISE_WITHOUT_TAG = {  # in one of the versions of torch that are supported
    aten.leaky_relu.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
# Where their flag `training` stands among the arguments.
_RANDOM_IN_TRAINING = {aten.dropout.default: 2, aten.rrelu.default: 3}
# They take entries by position: the model's code says which.
_TAKING = {
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.narrow.default,
    aten.index_select.default,
    aten.roll.default,
    aten.channel_shuffle.default,
}
# Their arguments are sizes.
_SIZED = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
}
# They put every entry of their inputs somewhere, or nowhere, and change none.
_MOVING = _TAKING | {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.cat.default,
    aten.stack.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    *(getattr(aten, f"upsample_nearest{d}d").vec for d in (1, 2, 3)),
    *(getattr(aten, f"_upsample_nearest_exact{d}d").vec for d in (1, 2, 3)),
}
# Their parameters and statistics lie along dim 1.
_CHANNELWISE = {
    aten._native_batch_norm_legit_no_training.default,
    aten.batch_norm.default,
    aten.instance_norm.default,
    aten.prelu.default,
    aten._prelu_kernel.default,
}
# How many dims, counted from the last, they mix.
_MIXING_LAST = {
    getattr(aten, f"{name}{d}d").default: d
    for d in (1, 2, 3)
    for name in ("max_pool", "avg_pool", "adaptive_avg_pool")
} | {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
    aten.scaled_dot_product_attention.default: 2,
}
_NORMALISING = {aten.layer_norm.default, aten.rms_norm.default}
_REDUCING = {
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.prod.dim_int,
    aten.logsumexp.default,
}
# They reduce too, and zeros add nothing to the result. Where their dims stand among the arguments.
_SUMMING = {
    aten.sum.default: 1,
    aten.sum.dim_IntList: 1,
    aten.linalg_vector_norm.default: 2,
}
_ALONG_ONE_DIM = {
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
}


def _layer(operation: Operation, ks: dict[str, int]) -> Iterator[Relation]:
    """It needs no tail, and brings forth zeros by itself."""
    input, output, dim = operation.args[0], operation.output, layer_dim(operation)
    for d in range(len(shape(output))):
        if d != dim:
            yield same((input, d), (output, d))
    k = ks.get(operation.args[1])
    before, after = torch.arange(shape(input)[dim]), torch.arange(shape(output)[dim])
    if k is not None:
        before, after = before.masked_fill(before >= k, -1), after.masked_fill(after >= k, -1)
    yield related((input, dim), (output, dim), before, after)


def _pointwise(operation: Operation) -> Iterator[Relation]:
    output = operation.output
    for source in operation.sources:
        missing = len(shape(output)) - len(shape(source))
        for dim, size in enumerate(shape(source)):
            if size == shape(output)[dim + missing]:  # otherwise one entry for all
                yield same((source, dim), (output, dim + missing))


def _linear(operation: Operation, rules: Rules) -> None:
    input, weight = operation.args[:2]
    bias = operation.arg(2)
    last, out_last = len(shape(input)) - 1, len(shape(operation.output)) - 1
    rules.reads.append(Read(operation, (input, last), (weight, 1), bias))
    rules.relations.append(same((weight, 0), (operation.output, out_last)))
    if bias is not None:
        rules.relations.append(same((bias, 0), (operation.output, out_last)))
    for dim in range(last):
        rules.relations.append(same((input, dim), (operation.output, dim)))


def _convolve(operation: Operation, rules: Rules) -> None:
    input, weight = operation.args[:2]
    bias, output = operation.arg(2), operation.output
    transposed = operation.target in _CONV_TRANSPOSE
    groups = operation.arg(6, 1)
    dim = len(shape(input)) - (len(shape(weight)) - 2) - 1  # 0 where there is no batch dim
    if not transposed:
        rules.relations.append(same((weight, 0), (output, dim)))
    if groups == 1:
        rules.reads.append(Read(operation, (input, dim), (weight, 0 if transposed else 1), bias))
        if transposed:
            rules.relations.append(same((weight, 1), (output, dim)))
    else:  # whole groups go
        ins, outs = torch.arange(shape(input)[dim]), torch.arange(shape(output)[dim])
        in_group = ins // (len(ins) // groups)
        out_group = outs // (len(outs) // groups)
        rules.relations.append(related((input, dim), (output, dim), in_group, out_group))
        if transposed:
            rules.relations.append(same((input, dim), (weight, 0)))
    if bias is not None:
        rules.relations.append(same((bias, 0), (output, dim)))
    if dim == 1:
        rules.relations.append(same((input, 0), (output, 0)))


def _multiply(
    operation: Operation, rules: Rules, left: fx.Node, right: fx.Node, bias: Any = None
) -> None:
    """A matrix product of values; `right` may be a weight of shape (in, out)."""
    output = operation.output
    rank, rank_right, rank_out = len(shape(left)), len(shape(right)), len(shape(output))
    if rank < 2 or rank_right < 2:
        return
    rules.reads.append(Read(operation, (left, rank - 1), (right, rank_right - 2), bias))
    rules.reads.append(Read(operation, (right, rank_right - 2), (left, rank - 1), None))
    rules.relations.append(same((left, rank - 2), (output, rank_out - 2)))
    rules.relations.append(same((right, rank_right - 1), (output, rank_out - 1)))
    if bias is not None and shape(bias)[-1] == shape(output)[-1]:
        rules.relations.append(same((bias, len(shape(bias)) - 1), (output, rank_out - 1)))
    for factor, its_rank in ((left, rank), (right, rank_right)):
        for dim in range(its_rank - 2):
            out_dim = dim + rank_out - its_rank
            if shape(factor)[dim] == shape(output)[out_dim]:
                rules.relations.append(same((factor, dim), (output, out_dim)))


def _multiply_as_written(operation: Operation, rules: Rules) -> None:
    """An einsum. Without ellipsis and diagonals, and with each sum over two factors at most."""
    equation, factors = operation.args[:2]
    written, arrow, result = equation.replace(" ", "").partition("->")
    terms = written.split(",")
    if "." in equation or any(len(set(term)) < len(term) for term in terms):
        return
    if not arrow:
        letters = written.replace(",", "")
        result = "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    sizes = dict(zip(result, shape(operation.output), strict=True))
    for letter in sorted(set("".join(terms))):
        places = [(f, t.index(letter)) for f, t in zip(factors, terms, strict=True) if letter in t]
        if letter in result:
            out = (operation.output, result.index(letter))
            places = [place for place in places if shape(place[0])[place[1]] == sizes[letter]]
            rules.relations += [same(place, out) for place in places]
        elif len(places) == 1:
            rules.reads.append(Read(operation, places[0]))
        elif len(places) == 2 and len({shape(node)[dim] for node, dim in places}) == 1:
            one, other = places
            rules.reads += [Read(operation, one, other), Read(operation, other, one)]


def _multiply_pairs(operation: Operation, rules: Rules) -> None:
    """Each feature of one input times each of the other, weighted: (out, one, other)."""
    one, other, weight = operation.args[:3]
    bias, last = operation.arg(3), len(shape(operation.output)) - 1
    rules.reads.append(Read(operation, (one, last), (weight, 1)))
    rules.reads.append(Read(operation, (other, last), (weight, 2)))
    rules.relations.append(same((weight, 0), (operation.output, last)))
    if bias is not None:
        rules.relations.append(same((bias, 0), (operation.output, last)))
    for source in (one, other):
        for dim in range(last):
            rules.relations.append(same((source, dim), (operation.output, dim)))


def _recur_once(operation: Operation, rules: Rules) -> None:
    """One step. Its input weights lose columns; its outputs are computed all or none."""
    input, at = operation.args[0], _CELLS[operation.target]
    place = (input, len(shape(input)) - 1)
    rules.reads.append(Read(operation, place, (operation.args[at], 1), operation.arg(at + 2)))


def _recur(operation: Operation, rules: Rules) -> None:
    """Its input weights lose columns; its outputs are computed all or none."""
    input = operation.args[0]
    weights = operation.args[_RECURRENT[operation.target]]
    has_biases, layers = operation.args[3], operation.args[4]
    directions = 2 if operation.args[7] else 1
    of_one_direction = len(weights) // (layers * directions)
    for direction in range(directions):  # of the first layer
        first = direction * of_one_direction
        bias = weights[first + 2] if has_biases else None
        place = (input, len(shape(input)) - 1)
        rules.reads.append(Read(operation, place, (weights[first], 1), bias))


def _through(operation: Operation) -> Iterator[Relation]:
    """Operations that treat some dims entry by entry."""
    target, output = operation.target, operation.output
    if not operation.args or not isinstance(operation.args[0], fx.Node):
        return
    input = operation.args[0]
    rank = len(shape(input))
    dims: dict[int, int] = {}  # of the input, and where they are in the output
    if target in _CHANNELWISE:
        dims = {0: 0, 1: 1} if rank > 1 else {}
    elif target in _MIXING_LAST:
        dims = {d: d for d in range(rank - _MIXING_LAST[target])}
    elif target in _NORMALISING:
        dims = {d: d for d in range(rank - len(operation.args[1]))}
    elif target in _ALONG_ONE_DIM:
        dims = {d: d for d in range(rank) if d != operation.args[1] % rank}
    elif target is aten.group_norm.default:
        dims = {0: 0}
    elif target is aten.glu.default:
        along = operation.arg(1, -1) % rank
        dims = {d: d for d in range(rank) if d != along}
        half = shape(output)[along]
        halves = torch.arange(2 * half) % half
        yield related((input, along), (output, along), halves, torch.arange(half))
    elif target is aten.cosine_similarity.default:
        other = operation.args[1]
        if shape(input) != shape(other):
            return
        along = operation.arg(2, 1) % rank
        yield same((input, along), (other, along))
        for dim in range(rank):
            if dim != along:
                yield same((input, dim), (output, dim - (dim > along)))
                yield same((other, dim), (output, dim - (dim > along)))
    elif target is aten._weight_norm.default and operation.arg(2, 0) == 0:
        dims = {0: 0}
        yield same((operation.args[1], 0), (output, 0))
    elif target in _REDUCING or target in _SUMMING:
        reduced = _reduced(operation)
        if rank - len(reduced) == len(shape(output)):
            dims = {d: d - sum(r < d for r in reduced) for d in range(rank) if d not in reduced}
        else:
            dims = {d: d for d in range(rank) if d not in reduced}
    for dim, out_dim in dims.items():
        yield same((input, dim), (output, out_dim))
    if target in _CHANNELWISE and rank > 1:
        for source in operation.sources[1:]:
            if shape(source) == (shape(output)[1],):
                yield same((source, 0), (output, 1))
    if target is aten.scaled_dot_product_attention.default:
        for source in operation.sources[1:]:
            missing = len(shape(output)) - len(shape(source))
            for dim in range(len(shape(source)) - 2):
                if shape(source)[dim] == shape(output)[dim + missing]:
                    yield same((source, dim), (output, dim + missing))


def _reduced(operation: Operation) -> set[int]:
    """The dims of its input that it reduces."""
    rank = len(shape(operation.args[0]))
    given: Any = operation.arg(_SUMMING.get(operation.target, 1))
    dims = {given} if isinstance(given, int) else set(given or range(rank))
    return {d % rank for d in dims}


def _sums(operation: Operation) -> Iterator[Read]:
    """Features that are added up as they are, or by their magnitude."""
    if operation.target in _SUMMING:
        is_norm = operation.target is aten.linalg_vector_norm.default
        if not is_norm or 0 < operation.arg(1, 2) < float("inf"):
            for dim in _reduced(operation):
                yield Read(operation, (operation.args[0], dim))
    elif operation.target is aten.cosine_similarity.default:
        for source in operation.sources:
            yield Read(operation, (source, operation.arg(2, 1) % len(shape(source))))


def belongs_to_attention(graph: Graph, node: fx.Node) -> bool:
    """Whether it is a tensor of `nn.MultiheadAttention`, whose code wants all of one size."""
    for name in graph.names.get(node, []):
        owner, _, attribute = name.rpartition(".")
        if isinstance(graph.model.get_submodule(owner), nn.MultiheadAttention):
            return attribute not in ("k_proj_weight", "v_proj_weight")
    return False
