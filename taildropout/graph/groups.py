"""What goes along when features are rearranged: the symmetries of a network.

Features may change places where all that is tied to them changes along and the network computes
the same. Starting from the features of a layer, a permutation is carried over everything that the
operations state, to all values and parameters that it reaches; where an operation does not allow
it, the reason is known. What only linear maps write and read may be turned, too.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .dataflow import Dataflow, Operation, layer_dim, where
from .exports import LAYER
from .norms import Norms
from .relations import Place, Read, Relation, Saying
from .rules import Rule, rule_of

aten = torch.ops.aten

Say = Callable[[Operation], tuple[Saying, ...]]


class Tied(Exception):
    """Features can't be rearranged; the message says what hinders it."""


@dataclass(frozen=True, eq=False)
class Group:
    """Features that can be rearranged, and all layers that hand them on.

    Attributes:
        layers: their names.
        n: how many features there are.
        multiple_of: these many in a row stay together.
        turns: the parameters that a rotation turns, by their names, and along which dim; None
            where more than linear maps touch the features.
        readers: the parameters that multiply the features and sum over them: along which dim,
            and which feature each entry there multiplies, -1 for none.
    """

    layers: tuple[str, ...]
    n: int
    multiple_of: int
    turns: tuple[tuple[tuple[str, ...], int], ...] | None
    readers: tuple[tuple[str, int, Tensor], ...]


def find_groups(
    flow: Dataflow, say: Say, norms: Norms, names: Collection[str]
) -> tuple[list[Group], dict[str, str]]:
    """The features of the named layers that can be rearranged; of the other layers, why not.

    Of layers whose features are parts of each other, as a channel holds positions, those are taken
    of which there are fewest, and the others go along.
    """
    symmetries = Symmetries(flow, say, norms)
    found: list[Group] = []
    left: dict[str, str] = {}
    along: dict[str, list[str]] = {}  # by the first layer of a group: those of which it has parts
    for name in names:
        if any(name in group.layers for group in found):
            continue
        try:
            group, parts = _group_of(flow, symmetries, name)
        except Tied as reason:
            left[name] = str(reason)
            continue
        others = [other for other in (*group.layers, *parts) if other not in names]
        if others:
            left[name] = f"layer {others[0]!r} has the same features: name both, or neither"
            continue
        found.append(group)
        along[group.layers[0]] = parts
    chosen: list[Group] = []
    for group in sorted(found, key=lambda group: group.n // group.multiple_of):
        taken = [other for other in chosen if _overlap(group, other, along)]
        if taken:
            of = taken[0].layers[0]
            left |= dict.fromkeys(group.layers, f"they go along with those of layer {of!r}")
        else:
            chosen.append(group)
    order = {name: i for i, name in enumerate(names)}
    return sorted(chosen, key=lambda group: order[group.layers[0]]), left


def _overlap(group: Group, other: Group, along: dict[str, list[str]]) -> bool:
    return not set(group.layers).isdisjoint(along[other.layers[0]]) or not set(
        other.layers
    ).isdisjoint(along[group.layers[0]])


def _group_of(flow: Dataflow, symmetries: "Symmetries", name: str) -> tuple[Group, list[str]]:
    """With the layers of which it has parts.

    Raises:
        Tied: its features can't be rearranged.
    """
    n, together = flow.n[name], flow.layers[name].multiple_of
    first: Tied | None = None
    for m in (m for m in range(together, n // 2 + 1, together) if n % m == 0):
        try:
            carried = [symmetries.carried(name, order) for order in _generators(n, m)]
        except Tied as reason:
            first = first or reason
            continue
        reached = list(dict.fromkeys(layer for one in carried for layer in _layers_in(flow, one)))
        same = [
            other for other in reached if all(_alike(flow, one, name, other) for one in carried)
        ]
        odd = [other for other in same if m % flow.layers[other].multiple_of]
        if not odd:
            turns = symmetries.turns(name)
            readers = symmetries.readers(name)
            parts = [other for other in reached if other not in same]
            return Group(tuple(same), n, m, turns, readers), parts
        first = first or Tied(f"layer {odd[0]!r} has the same features in larger groups")
    raise first or Tied("there is one feature, or one group of them")


def _generators(n: int, m: int) -> Iterator[Tensor]:
    """Two permutations of blocks of m, of which all others are made."""
    blocks = torch.arange(n).view(-1, m)
    swapped = blocks.clone()
    swapped[[0, 1]] = blocks[[1, 0]]
    yield swapped.flatten()
    if len(blocks) > 2:
        yield blocks.roll(1, 0).flatten()


def _layers_in(flow: Dataflow, carried: dict[Place, Tensor]) -> Iterator[str]:
    for call in flow.calls():
        if (call.output, layer_dim(call)) in carried:
            yield str(call.args[1])


def _alike(flow: Dataflow, carried: dict[Place, Tensor], name: str, other: str) -> bool:
    """Whether all calls of both layers have the same permutation."""
    orders = [
        carried.get((call.output, layer_dim(call)))
        for call in flow.calls()
        if call.args[1] in (name, other)
    ]
    first = orders[0]
    return first is not None and all(o is not None and torch.equal(o, first) for o in orders)


class Symmetries:
    """What becomes of all values of a dataflow when features are rearranged."""

    def __init__(self, flow: Dataflow, say: Say, norms: Norms) -> None:
        self.flow, self.say, self.norms = flow, say, norms

    def carried(self, name: str, order: Tensor) -> dict[Place, Tensor]:
        """The places that change with a layer's features, feature i there having been `order[i]`.

        For each of them, the same of its features.

        Raises:
            Tied: it can't be carried everywhere.
        """
        found = _Carried(self, dict.fromkeys(self._places_of(name), order))
        found.settle()
        return found.orders

    def turns(self, name: str) -> tuple[tuple[tuple[str, ...], int], ...] | None:
        """The parameters that turn with a layer's features; None where not all maps are linear."""
        flow, waiting, seen = self.flow, self._places_of(name), dict[Place, None]()
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen[place] = None
            node = place[0]
            if node in flow.returned or not (flow.names.get(node) or node in flow.operations):
                return None
            for operation in _operations_at(flow, node):
                along = self._turned_along(operation, place)
                if along is None:
                    return None
                waiting += along
        return tuple((tuple(flow.names[n]), dim) for n, dim in seen if n in flow.names)

    def readers(self, name: str) -> tuple[tuple[str, int, Tensor], ...]:
        """The parameters that multiply a layer's features behind it, and sum over them.

        With the feature that each of their entries multiplies, -1 for none.
        """
        found: dict[Place, Tensor] = {}
        features = torch.arange(self.flow.n[name])
        waiting, seen = [(place, features) for place in self._places_of(name)], set[Place]()
        while waiting:
            place, features = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            for user in self.flow.users[place[0]]:
                for said in self.say(user):
                    if isinstance(said, Read) and said.place == place and said.weight:
                        if said.weight[0] in self.flow.names:
                            found[said.weight] = features
                    elif isinstance(said, Relation):
                        waiting += [
                            (out, _by_label(features, labels, there))
                            for source, labels, out, there in said.passes(user.output)
                            if source == place
                        ]
        names = self.flow.names
        return tuple((names[n][0], dim, one) for (n, dim), one in found.items() if names[n])

    def _places_of(self, name: str) -> list[Place]:
        calls = [call for call in self.flow.calls() if call.args[1] == name]
        return [(call.output, layer_dim(call)) for call in calls]

    def _turned_along(self, operation: Operation, place: Place) -> list[Place] | None:
        """What else turns, since features at a place do; None where the operation is no linear one."""
        carries = operation.target in _LINEAR_ALONG
        if not (carries or operation.target in _LINEAR_MAPS):
            return None
        along: list[Place] = []
        touched = False
        for said in self.say(operation):
            tie = said.tie if isinstance(said, Read) else said
            if not isinstance(tie, Relation) or place not in tie.places:
                continue
            others = [other for other in tie.places if other != place]
            touched = True
            if not _one_by_one(tie) or len(others) != 1:
                return None
            if not carries and not any(self.flow.names.get(node) for node, _ in tie.places):
                return None  # a dim along which samples lie, or a product of two values
            along += others
        if operation.target is aten.add.Tensor and place[0] is operation.output and len(along) != 2:
            return None  # a number is added to all features
        return along if touched else None


class _Carried:
    """A permutation on its way through the dataflow.

    Attributes:
        orders: at each place, for each of its features which it was before; -1 where that is
            not known yet.
    """

    def __init__(self, symmetries: Symmetries, start: dict[Place, Tensor]) -> None:
        self.flow, self.say, self.norms = symmetries.flow, symmetries.say, symmetries.norms
        self.orders: dict[Place, Tensor] = {}
        self.waiting: deque[Place] = deque()
        for place, order in start.items():
            self._put(place, order, "the layer")

    def settle(self) -> None:
        """Carry it everywhere; features that nothing is said of stay where they are."""
        while True:
            while self.waiting:
                self._carry_on(self.waiting.popleft())
            partly = {place: order for place, order in self.orders.items() if (order < 0).any()}
            if not partly:
                break
            for place, order in partly.items():
                filled = torch.where(order < 0, torch.arange(len(order)), order)
                self._put(place, filled, "an operation")
        moved = {p: order for p, order in self.orders.items() if not _is_identity(order)}
        for place, order in moved.items():
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise Tied(f"{_in_words(self.flow, place)} mixes them with others")
        self.orders = moved

    def _put(self, place: Place, order: Tensor, by: str) -> None:
        before = self.orders.get(place)
        if before is None:
            before = torch.full_like(order, -1)
        elif bool(((before != order) & (before >= 0) & (order >= 0)).any()):
            raise Tied(f"{by} ties them to features in another order")
        new = torch.where(before < 0, order, before)
        if place not in self.orders or not torch.equal(new, before):
            self.orders[place] = new
            self.waiting.append(place)

    def _carry_on(self, place: Place) -> None:
        order = self.orders[place]
        if _is_identity(order, but_unknown=True):
            return
        self._check(place)
        for operation in _operations_at(self.flow, place[0]):
            for said in self.say(operation):
                tie = said.tie if isinstance(said, Read) else said
                if isinstance(tie, Relation) and place in tie.places:
                    self._carry_over(tie, place, order, where(operation))

    def _carry_over(self, tie: Relation, place: Place, order: Tensor, by: str) -> None:
        alone = len(tie.parts) == 1
        for part in tie.parts:
            sides = [
                (tie.whole, part.labels_of_whole, part.place, part.labels),
                (part.place, part.labels, tie.whole, part.labels_of_whole),
            ]
            for source, labels, other, there in sides:
                if source == place:
                    passed = _passed(order, labels, there, ranked=alone or source != tie.whole)
                    if passed is None:
                        raise Tied(f"{by} takes features by their number, or some together")
                    self._put(other, passed, by)

    def _check(self, place: Place) -> None:
        """Whether all that computes or reads the features lets them change places."""
        flow, node = self.flow, place[0]
        own = flow.operations.get(node)
        if node in flow.returned:
            raise Tied("the model returns them")
        if node in flow.names:
            if not flow.names[node]:
                raise Tied(f"the constant {node.name!r} is no parameter or buffer")
        elif own is None:
            raise Tied(f"the model gets them as {node.name!r}")
        elif not any(isinstance(s, Relation) and place in s.places for s in self.say(own)):
            raise Tied(f"{where(own)} computes all features together")
        for user in flow.users[node]:
            ties = (said.tie if isinstance(said, Read) else said for said in self.say(user))
            if not any(isinstance(tie, Relation) and place in tie.places for tie in ties):
                mixes = (rule_of(user) or Rule(lambda operation: ())).mixes
                raise Tied(f"{where(user)} {self.norms.refused.get(user) or mixes}")


def _passed(order: Tensor, labels: Tensor, there: Tensor, *, ranked: bool) -> Tensor | None:
    """A permutation seen from the other side of a relation; None where it can't be.

    What has the same label belongs together. Several features of one label keep their order among
    themselves, since that is how the operation tells them apart; with `ranked` also here.
    """
    known = (order >= 0).nonzero().flatten()
    before, after = labels[known], labels[order[known]]
    if not torch.equal(before < 0, after < 0):
        return None
    if ranked:
        ranks = _ranks(labels)
        if not torch.equal(ranks[known][before >= 0], ranks[order[known]][before >= 0]):
            return None
    known = before >= 0
    before, after = before[known], after[known]
    count = 1 + int(torch.cat([labels, there, torch.zeros(1, dtype=torch.int64)]).max())
    moved = torch.full((count,), -1)
    moved[before] = after
    if not torch.equal(moved[before], after):
        return None
    ranks = _ranks(there)
    size = len(there) + 1
    keys = there * size + ranks
    ordered, numbers = torch.where(there >= 0, keys, -1).sort()
    here = there >= 0
    passed = torch.full_like(there, -1)
    target = moved[there[here]]
    wanted = target * size + ranks[here]
    found = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    if bool(((ordered[found] != wanted) & (target >= 0)).any()):
        return None
    passed[here] = torch.where(target >= 0, numbers[found], -1)
    return passed


def _ranks(labels: Tensor) -> Tensor:
    """Of each feature, how many before it have the same label."""
    ordered, numbers = labels.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    ranks = torch.empty_like(labels)
    ranks[numbers] = torch.arange(len(labels)) - first
    return ranks


def _by_label(features: Tensor, labels: Tensor, there: Tensor) -> Tensor:
    """Which feature each of those on the other side of a relation is, or is a part of."""
    count = 2 + int(torch.cat([labels, there, torch.zeros(1, dtype=torch.int64)]).max())
    of_label = torch.full((count,), -1).scatter(0, labels + 1, features)
    of_label[0] = -1
    return of_label[there + 1]


def _is_identity(order: Tensor, but_unknown: bool = False) -> bool:
    same = order == torch.arange(len(order))
    return bool((same | (order < 0)).all()) if but_unknown else bool(same.all())


def _operations_at(flow: Dataflow, node: fx.Node) -> list[Operation]:
    own = flow.operations.get(node)
    return [*([] if own is None else [own]), *flow.users[node]]


def _one_by_one(tie: Relation) -> bool:
    return len(tie.parts) == 1 and torch.equal(tie.parts[0].labels, tie.parts[0].labels_of_whole)


def _in_words(flow: Dataflow, place: Place) -> str:
    own = flow.operations.get(place[0])
    return place[0].name if own is None else where(own)


# Linear along the features, and the same for each: they add, or work along other dims.
_LINEAR_ALONG = {
    *(LAYER, aten.add.Tensor, aten.neg.default, aten.mean.dim, aten.sum.dim_IntList),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
    *(aten.dropout.default, aten.feature_dropout.default),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.movedim.int),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
    *(aten.select.int, aten.expand.default),
}
_LINEAR_MAPS = {
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default),
    *(aten.embedding.default, aten.lstm.input, aten.gru.input),
    *(aten.rnn_tanh.input, aten.rnn_relu.input),
    *(
        getattr(getattr(aten, f"conv{d}d"), how)
        for d in (1, 2, 3)
        for how in ("default", "padding")
    ),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
}
