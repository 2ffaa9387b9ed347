"""Which features of which value can go: facts about the dataflow of a model.

The dataflow is the graph of `torch.export`. Two facts are derived for its values, each about one
dim of the value:

- **known** (forwards from the layers): these features are constants, the same in every sample
  and at every position. Behind a layer the tail is zero; behind a sigmoid it is 0.5.
- **unneeded** (backwards from the layers): nothing reads these features.

Both follow the features through the operations that treat them one by one, up to a Linear or
Conv at either end. The one that computes unneeded features loses rows; the one that reads known
features loses columns and takes their contribution, a constant, into its bias.
"""

import copy
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ..functional import check_k_at_most
from ..insert import Inputs, as_arguments, tail_dropouts

aten = torch.ops.aten


class PruningError(RuntimeError):
    """The network can't be cut such that it provably computes the same."""


@dataclass(frozen=True)
class Cut:
    """Of the `size` indices along `dim` of the tensor `name`, only `keep` stay."""

    name: str
    dim: int
    size: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Fold:
    """The constants that a consumer read from its removed columns: added to its bias."""

    name: str
    constant: Tensor


@dataclass(frozen=True)
class Findings:
    """What can go from a model at given ks."""

    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut]
    folds: list[Fold]


def analyse(model: nn.Module, k: dict[str, int], example_inputs: Inputs) -> Findings:
    """Find all cuts that setting `k` (by layer name) allows.

    Raises:
        PruningError: the model can't be exported, or a layer stands where it can't be cut.
        ValueError: k is above the number of features.
    """
    graph = _Graph(model, example_inputs)
    n = {}
    for name in k:
        widths = graph.layer_widths(name)
        if len(widths) != 1:
            raise PruningError(
                f"layer {name!r} must be called with one number of features, got "
                f"{sorted(widths) or 'no call'} while running the model on the example inputs"
            )
        n[name] = widths.pop()
        check_k_at_most(k[name], n[name])
    known = _find_known(graph, k)
    unneeded = _find_unneeded(graph, k)
    cuts, folds = _find_cuts(graph, known, unneeded)
    return Findings(k, n, cuts, folds)


# ------------------------------------------------------------------------------ the exported graph


@torch.library.custom_op("taildropout::layer", mutates_args=())
def _layer_op(input: Tensor, name: str) -> Tensor:
    """Stands for a TailDropout layer in an exported graph."""
    return input.clone()


@_layer_op.register_fake
def _(input: Tensor, name: str) -> Tensor:
    return torch.empty_like(input)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not in the state dict too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors with the model: its modules can be changed freely."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


class _Graph:
    """The model's dataflow, in which each TailDropout is one node, and its tensors in float64."""

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
        self.model = model
        traced = structural_copy(model).eval()
        self.layer_dim: dict[str, int] = {}
        for name, layer in tail_dropouts(traced).items():
            self.layer_dim[name] = layer.dropout_dim
            layer.forward = lambda input, name=name: _layer_op(input, name)  # type: ignore[method-assign,misc]
        args, kwargs = as_arguments(example_inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about its own tracing
                program = torch.export.export(traced, args, kwargs, strict=False)
                program = program.run_decompositions({})  # free of in-place operations
        except Exception as error:
            raise PruningError(
                "the model must be exportable by torch.export, which reads its dataflow, but "
                f"exporting it failed: {str(error).strip().splitlines()[0]}"
            ) from error
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.tensor: dict[fx.Node, Tensor] = {}  # parameters, buffers and other constants
        self.names: dict[
            fx.Node, list[str]
        ] = {}  # of parameters and buffers; tied ones have several
        tensors = tensors_by_name(model)
        by_name = {node.name: node for node in self.nodes}
        for spec in program.graph_signature.input_specs:
            if spec.target is None or spec.kind == InputKind.USER_INPUT:
                continue
            node = by_name[spec.arg.name]
            value = tensors.get(spec.target, program.constants.get(spec.target))
            if isinstance(value, Tensor):
                self.tensor[node] = value.detach().cpu()
                self.names[node] = [name for name, t in tensors.items() if t is value]

    def value(self, node: fx.Node) -> Tensor:
        """A parameter, buffer or constant, in float64."""
        value = self.tensor[node]
        return value.double() if value.is_floating_point() else value

    def layer_widths(self, name: str) -> set[int]:
        calls = [node for node in self.nodes if _is_layer(node) and node.args[1] == name]
        return {_shape(node)[self.layer_dim[name]] for node in calls}


def _is_layer(node: fx.Node) -> bool:
    return node.target is torch.ops.taildropout.layer.default


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape)


def _where(node: fx.Node) -> str:
    """The node in the user's words: the operation and the module that it belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = stack[-1][0] if stack else ""
    if node.op == "placeholder":
        return f"the input {node.name!r} of the model"
    if node.op == "output":
        return "the output of the model"
    name = getattr(node.target, "overloadpacket", node.target)
    name = getattr(name, "__name__", str(name))
    return f"{name} in module {module!r}" if module else f"{name} in the model's own forward"


def _nearest_layer(node: fx.Node, *, forwards: bool) -> str:
    """The layer, in the words of an error message, whose features arrive at or leave from a node."""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop(0)
        if _is_layer(here):
            return f"layer {here.args[1]!r}"
        for other in here.users if forwards else here.all_input_nodes:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return "a TailDropout layer"


# ------------------------------------------------------------------- how operations treat features
#
# Every operation that is not listed here mixes features, or is unknown: it is refused.

_LINEAR = {aten.linear.default}
_CONV = {
    getattr(getattr(aten, f"conv{d}d"), overload)
    for d in (1, 2, 3)
    for overload in ("default", "padding")
}
_RESHAPING = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_POINTWISE_WITHOUT_TAG = {  # in one of the versions of torch that are supported
    aten.leaky_relu.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten._to_copy.default,
    aten.to.dtype,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
# Where their flag `training` stands among the arguments.
_RANDOM_IN_TRAINING = {aten.dropout.default: 2, aten.rrelu.default: 3}
# Their parameters lie along dim 1.
_CHANNELWISE = {
    aten._native_batch_norm_legit_no_training.default,
    aten.batch_norm.default,
    aten.prelu.default,
    aten._prelu_kernel.default,
}
# How many dims, counted from the last, they pool over.
_POOLING = {
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
}
_REDUCING = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default}


def _is_pointwise(node: fx.Node) -> bool:
    tags: Any = getattr(node.target, "tags", ())
    if node.target in _RANDOM_IN_TRAINING:
        position = _RANDOM_IN_TRAINING[node.target]
        return len(node.args) <= position or node.args[position] is False
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return bool(torch.Tag.pointwise in tags or node.target in _POINTWISE_WITHOUT_TAG)


def _is_first_result(node: fx.Node) -> bool:
    """Whether the node takes the first result of an operation that has several."""
    return bool(node.target is operator.getitem and node.args[1] == 0)


@dataclass(frozen=True)
class _Features:
    """A fact about some features of a value: those of `mask` along `dim`.

    `constant` holds their values, where they are known.
    """

    dim: int
    mask: Tensor  # bool, (features,)
    constant: Tensor | None = None  # float64, (features,)

    def same_place(self, other: "_Features | None") -> bool:
        return other is not None and self.dim == other.dim and torch.equal(self.mask, other.mask)

    def spread(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape with the constants in their places, and 0 elsewhere."""
        assert self.constant is not None
        along_dim = [-1 if d == self.dim else 1 for d in range(len(shape))]
        return (self.constant * self.mask).view(along_dim).expand(shape)


def _passed_on(node: fx.Node, source: fx.Node, features: _Features) -> _Features | None:
    """Where features of `source` are in the output of `node`, if it treats them one by one."""
    rank, dim = len(_shape(source)), features.dim
    if _is_layer(node) or _is_first_result(node):
        return features
    if _is_pointwise(node):
        shape = _shape(node)
        dim += len(shape) - rank
        return None if shape[dim] != len(features.mask) else _Features(dim, features.mask)
    if node.target in _CHANNELWISE:
        return features if dim == 1 else None
    if node.target in _POOLING:
        return features if dim < rank - _POOLING[node.target] else None
    if node.target in _REDUCING:
        given: Any = node.args[1] if len(node.args) > 1 else None
        dims = [given] if isinstance(given, int) else given or range(rank)
        reduced = {d % rank for d in dims}
        keepdim = len(node.args) > 2 and node.args[2] is True
        if dim in reduced:
            return None
        return _Features(dim if keepdim else dim - sum(d < dim for d in reduced), features.mask)
    if node.target in _RESHAPING:
        for dim, index in _reshaped(node, source, features.dim):
            return _Features(dim, features.mask[index])
    return None


def _reshaped(node: fx.Node, source: fx.Node, dim: int) -> Iterator[tuple[int, Tensor]]:
    """The dims of the output along which alone `dim` of the source runs, and its index there.

    Found by reshaping a tensor that holds, at each place, its own index along `dim`.
    """
    shape = _shape(source)
    index = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    index = index.expand(shape).contiguous()
    args = [index if arg is source else arg for arg in node.args]
    reshaped: Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
    for d in range(reshaped.ndim):
        along = reshaped.movedim(d, 0).unsqueeze(-1).flatten(1)
        if shape[dim] > 1 and along.numel() and bool((along == along[:, :1]).all()):
            yield d, along[:, 0]


def _read_from(node: fx.Node, source: fx.Node, features: _Features) -> _Features | None:
    """The opposite of `_passed_on`: the features of `source` from which these of `node` come."""
    shape = _shape(source)
    for dim, size in enumerate(shape):
        if node.target not in _RESHAPING:
            candidates = [features.mask] if size == len(features.mask) else []
        else:  # a feature of the source can go only if all its places in the output can
            candidates = []
            for out_dim, index in _reshaped(node, source, dim):
                if out_dim == features.dim:
                    stays = torch.zeros(size, dtype=torch.int64)
                    stays.index_add_(0, index, (~features.mask).long())
                    candidates.append(stays == 0)
        for mask in candidates:
            read = _Features(dim, mask)
            if features.same_place(_passed_on(node, source, read)):
                return read
    return None


def _is_broadcast(node: fx.Node, source: fx.Node, dim: int) -> bool:
    """Whether an elementwise operation reads one entry of `source` for all features."""
    dim -= len(_shape(node)) - len(_shape(source))
    return _is_pointwise(node) and (dim < 0 or _shape(source)[dim] == 1)


def _passes_features_on(node: fx.Node) -> bool:
    return (
        _is_layer(node)
        or _is_first_result(node)
        or _is_pointwise(node)
        or node.target in _CHANNELWISE | _POOLING.keys() | _REDUCING | _RESHAPING
    )


def _feature_dim_of_input(node: fx.Node) -> int | None:
    """The dim along which a Linear or Conv reads its features; None if it can't be cut."""
    if node.target in _LINEAR:
        return len(_shape(_input(node))) - 1
    groups = node.args[6] if len(node.args) > 6 else 1
    if node.target in _CONV and groups == 1 and len(_shape(_input(node))) == len(_shape(node)):
        return 1
    return None


def _feature_dim_of_output(node: fx.Node) -> int | None:
    """The dim along which a Linear or Conv computes features; None if it can't be cut."""
    dim = _feature_dim_of_input(node)
    return len(_shape(node)) - 1 if dim is not None and node.target in _LINEAR else dim


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


# ------------------------------------------------------------------------------- the two facts


def _find_known(graph: _Graph, k: dict[str, int]) -> dict[fx.Node, _Features]:
    """Which features are constants, and which: from the layers forwards."""
    known: dict[fx.Node, _Features] = {}
    for node in graph.nodes:
        if _is_layer(node) and node.args[1] in k:
            features = _add_tail(graph, node, k, known.get(_input(node)))
            if features.mask.any():
                known[node] = features
            continue
        sources = [source for source in node.all_input_nodes if source in known]
        if not sources:
            continue
        if node.op == "output":
            raise PruningError(
                f"the features of {_nearest_layer(sources[0], forwards=False)} reach the output of "
                "the model, whose shape would change: slice the output to the first k instead"
            )
        if sources == [node.args[0]] and known[sources[0]].dim == _feature_dim_of_input(node):
            continue
        places = [_passed_on(node, source, known[source]) for source in sources]
        place = places[0]
        if place is None or not all(place.same_place(other) for other in places):
            raise PruningError(
                f"the features of {_nearest_layer(sources[0], forwards=False)} are read by "
                f"{_where(node)}, which mixes features or is not supported: they must pass through "
                "elementwise functions, BatchNorm, pooling and reshaping only, to a Linear or an "
                "ungrouped Conv"
            )
        constant = _constant_along(_evaluate(graph, node, known), place, node)
        known[node] = _Features(place.dim, place.mask, constant)
    return known


def _add_tail(
    graph: _Graph, node: fx.Node, k: dict[str, int], before: _Features | None
) -> _Features:
    """The tail of a layer, and what was known (or unneeded) besides."""
    name = str(node.args[1])
    shape = _shape(node)
    dim = range(len(shape))[graph.layer_dim[name]]
    tail = torch.arange(shape[dim]) >= k[name]
    constant = torch.zeros(shape[dim], dtype=torch.float64)
    if before is None:
        return _Features(dim, tail, constant)
    if before.dim != dim:
        raise PruningError(f"layer {name!r} reads features of another layer along another dim")
    if before.constant is not None:
        constant = before.constant.masked_fill(tail, 0)
    return _Features(dim, tail | before.mask, constant)


def _evaluate(graph: _Graph, node: fx.Node, known: dict[fx.Node, _Features]) -> Tensor:
    """The node's value with its inputs' known features in place, in float64."""

    def value(source: fx.Node) -> Tensor:
        if source in known:
            values = known[source].spread(_shape(source)).contiguous()
            dtype = source.meta["val"].dtype if isinstance(source.meta["val"], Tensor) else None
            return values if dtype is None or dtype.is_floating_point else values.to(dtype)
        if source in graph.tensor:
            return graph.value(source)
        raise PruningError(
            f"the features of {_nearest_layer(node, forwards=False)} meet other values in "
            f"{_where(node)}: its tail is no longer constant there"
        )

    if _is_first_result(node):
        return value(_input(node))
    mapped: Any = fx.node.map_arg((node.args, node.kwargs), value)
    args, kwargs = mapped
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    first: Tensor = result[0] if isinstance(result, tuple | list) else result
    return first.to("cpu", torch.float64)


def _constant_along(value: Tensor, features: _Features, node: fx.Node) -> Tensor:
    """The constant of each feature, checked to be the same at every place."""
    rows = value.movedim(features.dim, 0).unsqueeze(-1).flatten(1)
    rows = torch.where(features.mask[:, None], rows, 0)
    if rows.shape[1] == 0:
        raise PruningError("the example inputs must hold at least one sample")
    if not torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=1e-12, atol=1e-14):
        raise PruningError(
            f"{_where(node)} turns the zeros of the tail into values that differ from place to "
            "place (padding with zeros behind a function that is not zero at zero does that)"
        )
    return rows[:, 0]


def _find_unneeded(graph: _Graph, k: dict[str, int]) -> dict[fx.Node, _Features]:
    """Which features nothing reads: from the layers backwards."""
    unneeded: dict[fx.Node, _Features] = {}
    for node in reversed(graph.nodes):
        if node in graph.tensor:
            continue
        reads = {user: _unneeded_by(graph, k, user, node, unneeded) for user in node.users}
        features = next((read for read in reads.values() if read is not None), None)
        if features is None:
            continue
        for user, read in reads.items():
            if not features.same_place(read):
                raise PruningError(
                    f"the features that {_where(node)} computes for "
                    f"{_nearest_layer(node, forwards=True)} are also read by {_where(user)}, past "
                    "the layer"
                )
        if _passes_features_on(node):
            _check_all_inputs(graph, node, features)
        elif features.dim != _feature_dim_of_output(node):
            raise PruningError(
                f"the features of {_nearest_layer(node, forwards=True)} come from {_where(node)}, "
                "which can't compute some of them only: they must come from a Linear or an "
                "ungrouped Conv, through elementwise functions, BatchNorm, pooling and reshaping "
                "only"
            )
        unneeded[node] = features
    return unneeded


def _unneeded_by(
    graph: _Graph,
    k: dict[str, int],
    user: fx.Node,
    node: fx.Node,
    unneeded: dict[fx.Node, _Features],
) -> _Features | None:
    """The features of `node` that `user` does not need."""
    behind = unneeded.get(user)
    if _is_layer(user) and user.args[1] in k:
        features = _add_tail(graph, user, k, behind)
        return features if features.mask.any() else None
    if behind is None or not _passes_features_on(user):
        return None
    return _read_from(user, node, behind)


def _check_all_inputs(graph: _Graph, node: fx.Node, features: _Features) -> None:
    for source in node.all_input_nodes:
        if source in graph.tensor or _is_broadcast(node, source, features.dim):
            continue
        if _read_from(node, source, features) is None:
            raise PruningError(
                f"the first k features of {_nearest_layer(node, forwards=True)} are not whole "
                f"features of what {_where(node)} reads (a channel that is flattened together with "
                "its positions can only go as a whole: choose k accordingly)"
            )


# ------------------------------------------------------------------------------------ the cuts


def _find_cuts(
    graph: _Graph, known: dict[fx.Node, _Features], unneeded: dict[fx.Node, _Features]
) -> tuple[list[Cut], list[Fold]]:
    """What the facts mean for parameters and buffers."""
    masks: dict[tuple[fx.Node, int], Tensor] = {}  # (tensor, dim): what goes
    folds: dict[str, Fold] = {}
    constants: dict[Any, Tensor] = {}  # what the columns of a weight that go contribute
    changed_for: dict[fx.Node, set[fx.Node]] = {}  # the nodes that ask for a tensor to change

    def change(tensor: Any, node: fx.Node) -> str:
        names = graph.names.get(tensor, [])
        if len(names) != 1:
            raise PruningError(
                f"{_where(node)} must read its weights directly from parameters or buffers of the "
                f"model, not from computed or tied ones, got {' = '.join(names) or tensor}"
            )
        changed_for.setdefault(tensor, set()).add(node)
        return names[0]

    def cut(tensor: Any, dim: int, mask: Tensor, node: fx.Node) -> None:
        name = change(tensor, node)
        if not torch.equal(masks.setdefault((tensor, dim), mask), mask):
            raise PruningError(f"{name!r} is read in several places that need different cuts")

    for node in graph.nodes:
        if _passes_features_on(node):
            gone = _union(node, known, unneeded)
            for source in node.all_input_nodes:
                if source not in graph.tensor:
                    _check_agreement(node, source, gone, _union(source, known, unneeded))
                elif gone is not None:
                    dim = _parameter_dim(graph, node, source, gone)
                    if dim is not None:
                        cut(source, dim, gone.mask, node)
        elif node.target in _LINEAR | _CONV:
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            if node in unneeded:
                for tensor in (weight, bias):
                    if tensor is not None:
                        cut(tensor, 0, unneeded[node].mask, node)
            if _input(node) in known:
                cut(weight, 1, known[_input(node)].mask, node)
                constant = _constant_read(graph, node, known[_input(node)])
                if bias is None and node in unneeded:  # a new bias has only the rows that stay
                    constant = constant[~unneeded[node].mask]
                first = constants.setdefault(weight, constant)
                if not torch.allclose(first, constant, rtol=1e-12, atol=1e-12):
                    raise PruningError(
                        f"{_where(node)} is called several times, and the features that go would "
                        "add another constant to its bias each time"
                    )
                if constant.any():
                    name = change(weight if bias is None else bias, node)
                    name = _name_of_bias(graph, name, node, bias)
                    folds[name] = Fold(name, constant)
    for tensor, nodes in changed_for.items():
        for other in set(tensor.users) - nodes:
            raise PruningError(
                f"{graph.names[tensor][0]!r} would be cut, but is also read by {_where(other)}"
            )
    return [
        Cut(graph.names[tensor][0], dim, len(mask), tuple((~mask).nonzero().flatten().tolist()))
        for (tensor, dim), mask in masks.items()
    ], list(folds.values())


def _union(
    node: fx.Node, known: dict[fx.Node, _Features], unneeded: dict[fx.Node, _Features]
) -> _Features | None:
    """The features that go from this value, for either reason."""
    facts = [fact[node] for fact in (known, unneeded) if node in fact]
    if len({features.dim for features in facts}) > 1:
        raise PruningError(f"{_where(node)} lies between two layers with different dims")
    masks = [features.mask for features in facts]
    return _Features(facts[0].dim, torch.stack(masks).any(0)) if facts else None


def _check_agreement(
    node: fx.Node, source: fx.Node, gone: _Features | None, before: _Features | None
) -> None:
    passed = None if before is None else _passed_on(node, source, before)
    agree = gone is None if passed is None else passed.same_place(gone)
    broadcast = before is None and gone is not None and _is_broadcast(node, source, gone.dim)
    if not (agree or broadcast):
        raise PruningError(f"{_where(source)} and {_where(node)} would lose different features")


def _parameter_dim(
    graph: _Graph, node: fx.Node, source: fx.Node, features: _Features
) -> int | None:
    """The dim along which a parameter has an entry per feature, if it has."""
    shape = graph.tensor[source].shape
    dim = 0 if node.target in _CHANNELWISE else features.dim - (len(_shape(node)) - len(shape))
    if dim < 0 or not shape or shape[dim] != len(features.mask):
        return None  # one entry for all features
    return dim


def _constant_read(graph: _Graph, node: fx.Node, columns: _Features) -> Tensor:
    """What a Linear or Conv computes from the columns that go, per output feature."""
    source = _input(node)
    values = columns.spread((1, *_shape(source)[1:]) if len(_shape(source)) > 1 else _shape(source))
    assert isinstance(node.args[1], fx.Node)
    if node.args[1] not in graph.tensor:
        raise PruningError(f"{_where(node)} must read its weights directly from parameters")
    args = [values, graph.value(node.args[1]), None, *node.args[3:]]
    result: Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
    dim = _feature_dim_of_output(node)
    assert dim is not None
    everything = torch.ones(result.shape[dim], dtype=torch.bool)
    return _constant_along(result, _Features(dim, everything), node)


def _name_of_bias(graph: _Graph, name: str, node: fx.Node, bias: Any) -> str:
    if bias is not None:
        return name
    owner, _, attribute = name.rpartition(".")
    module = graph.model.get_submodule(owner)
    if attribute != "weight" or getattr(module, "bias", name) is not None:
        raise PruningError(
            f"{_where(node)} needs a bias to take in the constant of the features that go, and "
            f"{name!r} does not belong to a module with a place for one"
        )
    return name.removesuffix("weight") + "bias"
