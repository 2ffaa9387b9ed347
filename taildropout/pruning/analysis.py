"""Which features of which value can go: facts about the dataflow of a model.

1. **What is constant.** Forwards from the layers: behind a layer the tail is zero, behind a
   sigmoid it is 0.5; in any case the same in every sample and at every position. What reads such
   features can do without them: their contribution, a constant, goes into its bias.
2. **What stays.** Starting from the layers, every dim of a value that features reach through
   operations that treat them one by one. At first all features there may go. Then those stay
   which something needs, and with them those that they are tied to, until nothing changes. So as
   much goes as can go, and for what stays the reason is known.
3. **The cuts** are what this means for parameters and buffers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..functional import check_k_at_most
from ..insert import Inputs
from .fitted import FittedTailDropout
from .graph import (
    LAYER,
    Graph,
    Operation,
    PruningError,
    layer_dim,
    module_of,
    shape,
    tensors_by_name,
    where,
)
from .rules import (
    Place,
    Read,
    Relation,
    Rules,
    aten,
    belongs_to_attention,
    has_sizes,
    is_recurrent,
    moves,
    rules_of,
    runs_on_no_features,
    takes_by_number,
    zeros_make_zeros,
)


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
class Fit:
    """A layer that takes the first `width` of what arrives, and hands `size` features on."""

    layer: str
    width: int
    size: int


@dataclass(frozen=True)
class Stay:
    """Something that can't go, though k says so: in front of the layer or behind it, and why."""

    layer: str
    side: str
    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """What can go from a model at given ks, and what can't."""

    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut]
    folds: list[Fold]
    fits: list[Fit] = field(default_factory=list)
    stays: list[Stay] = field(default_factory=list)


def analyse(
    model: nn.Module, k: dict[str, int], example_inputs: Inputs, *, trust_sizes: bool = True
) -> Findings:
    """Find all cuts that setting `k` (by layer name) allows.

    The dataflow does not tell a reshape by sizes that stand in the model's code from one by the
    sizes of its input. With `trust_sizes` it is taken for the latter. Without, features stay that
    are reshaped or split.

    Raises:
        PruningError: the model can't be exported, or it does not call a layer.
        ValueError: k is above the number of features.
    """
    graph = Graph(model, example_inputs)
    n, ks = {}, {}
    for name, layer in graph.layers.items():
        if isinstance(layer, FittedTailDropout):
            ks[name] = layer.width
    for name, value in k.items():
        widths = graph.layer_widths(name)
        if len(widths) != 1:
            raise PruningError(
                f"layer {name!r} must be called with one number of features, got "
                f"{sorted(widths) or 'no call'} while running the model on the example inputs"
            )
        n[name] = widths.pop()
        check_k_at_most(value, n[name])
        ks[name] = value
    rules = _RulesOfAll(graph, ks)
    constants = _Constants(graph, rules, ks)
    staying = _Staying(graph, rules, constants, ks, trust_sizes)
    return Findings(
        k,
        n,
        _cuts(graph, staying),
        list(_folds(graph, staying, constants)),
        list(_fits(graph, staying, ks)),
        list(_stays(graph, staying, k)),
    )


class _RulesOfAll:
    """The rules of every operation, found when asked for."""

    def __init__(self, graph: Graph, ks: dict[str, int]) -> None:
        self._graph, self._ks = graph, ks
        self._rules: dict[Operation, Rules] = {}

    def __getitem__(self, operation: Operation) -> Rules:
        if operation not in self._rules:
            self._rules[operation] = rules_of(self._graph, operation, self._ks)
        return self._rules[operation]


# ---------------------------------------------------------------------------- what is constant


@dataclass(frozen=True)
class _Known:
    """Features of `mask` have these values, in every sample and at every position."""

    mask: Tensor  # bool, (features,)
    value: Tensor  # float64, (features,); 0 outside of the mask

    def spread(self, place: Place) -> Tensor:
        node, dim = place
        along = [-1 if d == dim else 1 for d in range(len(shape(node)))]
        return self.value.view(along).expand(shape(node))


class _Constants:
    """What is known of the features at each place."""

    def __init__(self, graph: Graph, rules: _RulesOfAll, ks: dict[str, int]) -> None:
        self.graph, self.rules = graph, rules
        self.known: dict[Place, _Known] = {}
        self.lost: dict[Place, str] = {}  # the operation behind which features are no constants
        for node, operation in graph.operations.items():
            nodes = {at for at, _ in [*self.known, *self.lost]}
            if nodes.intersection(operation.sources):  # something is known, or was
                for dim in range(len(shape(node))):
                    self._find((node, dim), operation)
            if operation.target is LAYER and operation.args[1] in ks:
                self._add_tail((node, layer_dim(operation)), ks[operation.args[1]])

    def _add_tail(self, place: Place, k: int) -> None:
        tail = torch.arange(shape(place[0])[place[1]]) >= k
        value = torch.zeros(len(tail), dtype=torch.float64)
        before = self.known.get(place)
        if before is not None:
            tail, value = tail | before.mask, before.value.masked_fill(tail, 0)
        if tail.any():
            self.known[place] = _Known(tail, value)

    def _find(self, place: Place, operation: Operation) -> None:
        rules = self.rules[operation]
        passes = [
            (source, labels, there)
            for relation in rules.relations
            for source, labels, output, there in relation.passes(operation.output)
            if output == place
        ]
        for source, _, _ in passes:
            if source in self.lost:
                self.lost[place] = self.lost[source]
        if not any(source in self.known for source, _, _ in passes):
            return
        self.lost.setdefault(place, where(operation))  # unless all goes well
        size = shape(place[0])[place[1]]
        known, zero = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        for node in {source[0] for source, _, _ in passes}:
            from_node = torch.zeros(size, dtype=torch.bool)
            for source, labels, there in passes:
                if source[0] is node:
                    passed, passed_zero = self._passed(source, labels, there)
                    from_node |= passed | (there < 0)
                    if zeros_make_zeros(operation, source[0]):
                        zero |= passed_zero
            known &= from_node
        for made_at, made in rules.made:
            if made_at == place:
                known &= ~made
        related = {source[0] for source, _, _ in passes}
        if not moves(operation) and any(
            source not in related and not self.graph.is_constant(source)
            for source in operation.sources
        ):
            known[:] = False
        if operation.target is LAYER:
            ((source, _, there),) = passes
            known &= there >= 0
            value = self.known[source].value[there.clamp(min=0)].masked_fill(~known, 0)
            found = _Known(known, value)
        else:
            found = self._evaluate(operation, place, known & ~zero)
        # 0 times anything that is finite
        found = _Known(found.mask | zero, found.value.masked_fill(zero, 0))
        if found.mask.any():
            self.known[place] = found
            self.lost.pop(place)

    def _passed(self, source: Place, labels: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Which features of the output come from known ones only, and which from zeros only."""
        facts = self.known.get(source)
        if facts is None:
            known = self.graph.is_constant(source[0])
            return (there >= 0) & known, torch.zeros(len(there), dtype=torch.bool)
        count = 1 + int(max(labels.max(), there.max()))
        unknown, nonzero = torch.zeros(2, 1 + count, dtype=torch.bool)
        unknown[1 + labels[~facts.mask]] = True
        nonzero[1 + labels[~(facts.mask & (facts.value == 0))]] = True
        return ~unknown[1 + there] & (there >= 0), ~nonzero[1 + there] & (there >= 0)

    def _evaluate(self, operation: Operation, place: Place, known: Tensor) -> _Known:
        """The operation on what is known of its inputs, in float64; unknown features are 0."""
        nothing = _Known(torch.zeros_like(known), torch.zeros(len(known), dtype=torch.float64))
        if not known.any():
            return nothing
        try:
            values = {source: self._value(source) for source in operation.sources}
            result = operation.run(values).to("cpu", torch.float64)
        except (RuntimeError, TypeError):  # it can't be run in float64
            return nothing
        rows = result.movedim(place[1], 0).unsqueeze(-1).flatten(1)
        if rows.shape[1] == 0:
            raise PruningError("the example inputs must hold at least one sample")
        same = torch.isclose(rows, rows[:, :1], rtol=1e-12, atol=1e-14).all(1)
        mask = known & same & rows[:, 0].isfinite()
        return _Known(mask, rows[:, 0].masked_fill(~mask, 0))

    def _value(self, source: fx.Node) -> Tensor:
        if self.graph.is_constant(source):
            return self.graph.constant(source).contiguous()
        value = torch.zeros(shape(source), dtype=torch.float64)
        for at, facts in self.known.items():
            if at[0] is source:
                value = value + facts.spread(at)
        dtype = source.meta["val"].dtype
        return value if dtype.is_floating_point else value.to(dtype)


# --------------------------------------------------------------------------------- what stays


@dataclass(frozen=True)
class _Reason:
    name: str
    text: str


class _Staying:
    """For each place that features reach: 0 for those that go, else the number of a reason."""

    def __init__(
        self,
        graph: Graph,
        rules: _RulesOfAll,
        constants: _Constants,
        ks: dict[str, int],
        trust_sizes: bool,
    ) -> None:
        self.graph, self.rules, self.constants, self.ks = graph, rules, constants, ks
        self.trust_sizes = trust_sizes
        self.reasons: list[_Reason] = [_Reason("", "")]
        self.at: dict[Place, Tensor] = {}
        self.ties: dict[Place, list[Relation]] = {}
        self._reach()
        for place in self.at:
            self._need(place)
        for read in self.all_reads():
            self._need_what_is_read(read)
        self._settle()
        while self._mend():
            self._settle()

    def gone(self, place: Place) -> Tensor:
        return self.at[place] == 0

    def _reach(self) -> None:
        queue: list[Place] = []
        for node, operation in self.graph.operations.items():
            if operation.target is LAYER and operation.args[1] in self.ks:
                dim = layer_dim(operation)
                queue += [(node, dim), (operation.args[0], dim)]
        while queue:
            place = queue.pop(0)
            if place in self.at:
                continue
            self.at[place] = torch.zeros(shape(place[0])[place[1]], dtype=torch.int64)
            self.ties[place] = []
            for operation in self._operations_at(place[0]):
                rules = self.rules[operation]
                for relation in [*rules.relations, *(read.tie for read in rules.reads)]:
                    if place in relation.places:
                        self.ties[place].append(relation)
                        queue += relation.places

    def _operations_at(self, node: fx.Node) -> list[Operation]:
        """The one that computes the value, and those that read it."""
        own = self.graph.operations.get(node)
        return [*([] if own is None else [own]), *self.graph.users[node]]

    def all_reads(self) -> Iterator[Read]:
        seen = set()
        for node, _ in list(self.at):
            for operation in self._operations_at(node):
                if operation not in seen:
                    seen.add(operation)
                    for read in self.rules[operation].reads:
                        if all(place in self.at for place in read.tie.places):
                            yield read

    # ------------------------------------------------------------------------------ who needs what

    def _keep(self, place: Place, features: Tensor | None, name: str, text: str) -> bool:
        """Say why features stay (all of them for None); whether that is new."""
        stays = self.at[place]
        new = stays == 0 if features is None else (stays == 0) & features
        if not new.any():
            return False
        reason = _Reason(name, text)
        if reason not in self.reasons:
            self.reasons.append(reason)
        stays[new] = self.reasons.index(reason)
        return True

    def _need(self, place: Place) -> None:
        node, _ = place
        own = self.graph.operations.get(node)
        if node in self.graph.names:
            if not self.graph.names[node]:
                self._keep(place, None, f"the constant {node.name!r}", "is no parameter or buffer")
            if belongs_to_attention(self.graph, node):
                name = " = ".join(self.graph.names[node])
                self._keep(place, None, name, "nn.MultiheadAttention can't have it in another size")
        elif own is None:
            self._keep(place, None, f"the input {node.name!r} of the model", "comes from outside")
        else:
            rules = self.rules[own]
            if not any(place in relation.places for relation in rules.relations):
                self._keep(place, None, where(own), "computes all features or none")
            for made_at, made in rules.made:
                if made_at == place:
                    self._keep(place, made, where(own), "computes these features by itself")
        for user in self.graph.users[node]:
            rules = self.rules[user]
            ties = [*rules.relations, *(read.tie for read in rules.reads)]
            if not any(place in tie.places for tie in ties):
                text = "needs all features at once, or is not supported"
                self._keep(place, None, where(user), text)
        if node in self.graph.returned:
            self._keep(place, None, "the output of the model", "must keep its shape")

    def _need_what_is_read(self, read: Read) -> None:
        """Features that are not constant, and those whose constant has no place to go."""
        can_go = self._removable(read)
        for other in self.rules[read.operation].reads:
            if (other.place, other.weight) == (read.weight, read.place):
                can_go |= self._removable(other)  # a product: zeros in one factor are enough
        facts = self.constants.known.get(read.place)
        if facts is not None:
            text = "can't take in the constants that it reads there: it has zeros at the border, "
            text += "or no bias of its own"
            self._keep(read.place, facts.mask & ~can_go, where(read.operation), text)
        if read.place in self.constants.lost:
            text = (
                f"makes them differ from sample to sample, and {where(read.operation)} reads them"
            )
            self._keep(read.place, ~can_go, self.constants.lost[read.place], text)
        text = "reads them too, where they are not constant"
        self._keep(read.place, ~can_go, where(read.operation), text)

    def _removable(self, read: Read) -> Tensor:
        """The features that add nothing, or a constant that can go into the bias."""
        facts = self.constants.known.get(read.place)
        if facts is None:
            return torch.zeros(shape(read.place[0])[read.place[1]], dtype=torch.bool)
        if facts.value.any() and not self._foldable(read, facts):
            return facts.mask & (facts.value == 0)
        return facts.mask

    def _foldable(self, read: Read, facts: _Known) -> bool:
        """Whether what the constants add is the same everywhere, and there is a bias for it."""
        if (
            read.weight is None
            or name_of_bias(self.graph, read) is None
            or contribution(self.graph, read, facts.value) is None
        ):
            return False
        users = list(self.graph.users[read.weight[0]])
        if isinstance(read.bias, fx.Node):
            users += self.graph.users[read.bias]
        for user in users:  # called several times: each must read the same constants
            reads = [other for other in self.rules[user].reads if other.weight == read.weight]
            others = [self.constants.known.get(other.place) for other in reads]
            if not others or any(
                o is None or not torch.equal(o.value, facts.value) for o in others
            ):
                return False
        return True

    # ------------------------------------------------------------------------------------- together

    def _settle(self) -> None:
        """Features that are tied to ones that stay, stay too."""
        queue = list(dict.fromkeys(tie for ties in self.ties.values() for tie in ties))
        waiting = set(queue)
        while queue:
            tie = queue.pop(0)
            waiting.discard(tie)
            for place, why in self._consequences(tie):
                stays = self.at[place]
                new = (stays == 0) & (why > 0)
                if new.any():
                    stays[new] = why[new]
                    queue += [other for other in self.ties[place] if other not in waiting]
                    waiting.update(self.ties[place])

    def _consequences(self, tie: Relation) -> Iterator[tuple[Place, Tensor]]:
        """What stays at the parts because of the whole, and at the whole because of the parts."""
        whole = self.at[tie.whole]
        whole_stays, reason = torch.ones(len(whole), dtype=torch.bool), torch.zeros_like(whole)
        for part in tie.parts:
            labels, there = part.labels + 1, part.labels_of_whole + 1  # 0: belongs to nothing
            count = 1 + int(torch.cat([labels, there, torch.zeros(1).long()]).max())
            by_whole, by_part = torch.zeros(2, count, dtype=torch.int64)
            by_whole.scatter_reduce_(0, there, whole, "amax")
            by_part.scatter_reduce_(0, labels, self.at[part.place], "amax")
            by_whole[0] = by_part[0] = 0
            yield part.place, by_whole[labels]
            whole_stays &= by_part[there] > 0
            if not reason.any() or not (self.at[part.place] > 0).all():
                reason = by_part[there]  # the one that decides
        yield tie.whole, reason * whole_stays

    def _mend(self) -> bool:
        """Keep what the rules can't see; whether there was any."""
        changed = False
        for place, stays in self.at.items():
            gone = stays == 0
            if not gone.any():
                continue
            for operation in self._operations_at(place[0]):
                if gone.all() and not runs_on_no_features(operation):
                    first = torch.arange(len(gone)) == 0
                    text = "can't be run by torch on no features"
                    changed |= self._keep(place, first, where(operation), text)
                if not self.trust_sizes and has_sizes(operation):
                    text = "has sizes in the model's code, which pruning would change"
                    changed |= self._keep(place, None, where(operation), text)
                if takes_by_number(operation) and not self._takes_the_same(operation):
                    text = "takes features by their number, which pruning would change"
                    changed |= self._keep(place, None, where(operation), text)
        for node, operation in self.graph.operations.items():
            if operation.target is LAYER:
                changed |= self._keep_a_prefix((node, layer_dim(operation)), operation)
        for name in self.ks:
            changed |= self._keep_calls_alike(name)
        return changed

    def _keep_a_prefix(self, place: Place, operation: Operation) -> bool:
        """What a layer keeps are its first features still, so that a smaller k means the same."""
        if place not in self.at:
            return False
        stays = self.at[place][: self.ks.get(operation.args[1])]
        first = torch.arange(len(self.at[place])) < 1 + max(
            stays.nonzero().flatten().tolist(), default=-1
        )
        text = "keeps its first features without a gap"
        return self._keep(place, first, where(operation), text)

    def _takes_the_same(self, operation: Operation) -> bool:
        """Whether an operation with positions in its arguments still takes what it should."""
        (source, *_), output = operation.sources, operation.output
        kept_in = [self._kept((source, d)) for d in range(len(shape(source)))]
        kept_out = [self._kept((output, d)) for d in range(len(shape(output)))]
        numbers = torch.arange(source.meta["val"].numel()).view(shape(source))
        values: dict[fx.Node, Tensor] = {source: numbers}
        for other in operation.sources[1:]:
            if not self.graph.is_constant(other):
                return False
            values[other] = self.graph.constant(other)
        expected = _pick(operation.run(values), kept_out)
        values[source] = _pick(numbers, kept_in)
        replaced = {}
        if operation.target is aten.split.Tensor:  # from chunk: as many parts, of the new size
            dim, part = operation.arg(2, 0), operation.args[1]
            parts = -(-shape(source)[dim] // part)
            replaced = {1: max(1, -(-values[source].shape[dim] // parts))}
        try:
            actual = operation.run(values, replaced)
        except (RuntimeError, IndexError):
            return False
        return torch.equal(actual, expected)

    def _kept(self, place: Place) -> Tensor | None:
        return None if place not in self.at else (self.at[place] != 0).nonzero().flatten()

    def _keep_calls_alike(self, name: str) -> bool:
        """A layer that is called several times is one module: it does the same each time."""
        calls = [
            (operation.output, layer_dim(operation))
            for operation in self.graph.operations.values()
            if operation.target is LAYER and operation.args[1] == name
        ]
        stays = torch.stack([self.at[place] for place in calls]) if len(calls) > 1 else None
        if stays is None:
            return False
        anywhere = (stays != 0).any(0)
        text = "is called several times, and hands on the same features each time"
        return sum(self._keep(place, anywhere, f"layer {name!r}", text) for place in calls) > 0


def _pick(tensor: Tensor, kept: list[Tensor | None]) -> Tensor:
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, index)
    return tensor


# ------------------------------------------------------------------------------------ the cuts


def _cuts(graph: Graph, staying: _Staying) -> list[Cut]:
    """In the order of the model's tensors."""
    order = {name: i for i, name in enumerate(tensors_by_name(graph.model))}
    cuts = [
        Cut(name, dim, len(stays), tuple(stays.nonzero().flatten().tolist()))
        for (node, dim), stays in staying.at.items()
        if (stays == 0).any()
        for name in graph.names.get(node, [])
    ]
    return sorted(cuts, key=lambda cut: (order[cut.name], cut.dim))


def _folds(graph: Graph, staying: _Staying, constants: _Constants) -> Iterator[Fold]:
    done = set()
    for read in staying.all_reads():
        facts, name = constants.known.get(read.place), name_of_bias(graph, read)
        if facts is None or name is None or name in done:
            continue
        values = facts.value * staying.gone(read.place)
        constant = contribution(graph, read, values) if values.any() else None
        if constant is None or not constant.any():
            continue
        rows = _rows(read.weight) if read.weight else None
        if not isinstance(read.bias, fx.Node) and rows in staying.at:
            constant = constant[~staying.gone(rows)]  # a new bias has only the rows that stay
        done.add(name)
        yield Fold(name, constant)


def _rows(weight: Place) -> Place:
    """Where its outputs lie."""
    node, dim = weight
    return node, 1 - dim if dim < 2 else 0


def _fits(graph: Graph, staying: _Staying, ks: dict[str, int]) -> Iterator[Fit]:
    fits = {}
    for node, operation in graph.operations.items():
        if operation.target is LAYER and operation.args[1] in ks:
            name, dim = operation.args[1], layer_dim(operation)
            arrives, leaves = staying.at[(operation.args[0], dim)] > 0, staying.at[(node, dim)] > 0
            width, size = int(leaves[: ks[name]].sum()), int(leaves.sum())
            if (int(arrives.sum()), size) != (width, width):
                fits[name] = Fit(name, width, size)
    yield from fits.values()


def _stays(graph: Graph, staying: _Staying, k: dict[str, int]) -> Iterator[Stay]:
    for node, operation in graph.operations.items():
        if operation.target is not LAYER or operation.args[1] not in k:
            continue
        name, dim = operation.args[1], layer_dim(operation)
        for side, place in (("in front of", (operation.args[0], dim)), ("behind", (node, dim))):
            for number in staying.at[place][k[name] :].unique().tolist():
                if number:
                    reason = staying.reasons[number]
                    yield Stay(name, side, reason.name, reason.text)


def contribution(graph: Graph, read: Read, values: Tensor) -> Tensor | None:
    """What constant features add to each output; None where that differs from place to place."""
    operation, (source, dim) = read.operation, read.place
    if read.weight is None or not graph.is_constant(read.weight[0]):
        return None
    weight = graph.constant(read.weight[0])
    if is_recurrent(operation):
        return weight @ values
    along = [-1 if d == dim else 1 for d in range(len(shape(source)))]
    spread = values.view(along).expand(shape(source)).contiguous()
    inputs: dict[fx.Node, Tensor] = {source: spread, read.weight[0]: weight}
    bias = read.bias
    if isinstance(bias, fx.Node):
        inputs[bias] = torch.zeros(shape(bias), dtype=torch.float64)
    result = operation.run(inputs)
    out_dim = result.ndim - 1 - max(weight.ndim - 2, 0)  # of a Conv: in front of the positions
    rows = result.movedim(out_dim, 0).unsqueeze(-1).flatten(1)
    if not torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=1e-12, atol=1e-14):
        return None
    return rows[:, 0]


def name_of_bias(graph: Graph, read: Read) -> str | None:
    """The parameter that takes in a constant, or the one to be made; None if there is no place."""
    if isinstance(read.bias, fx.Node):
        names = graph.names.get(read.bias, [])
        return names[0] if len(names) == 1 else None
    names = graph.names.get(read.weight[0], []) if read.weight else []
    owner, _, attribute = names[0].rpartition(".") if len(names) == 1 else ("", "", "")
    if attribute != "weight" or module_of(read.operation) != owner:
        return None
    module = graph.model.get_submodule(owner)
    makes_one = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None
    if not makes_one:
        return None
    return names[0].removesuffix("weight") + "bias"
