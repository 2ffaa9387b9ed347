"""Which features of which value can go.

1. **What is constant**, forwards from the layers.
2. **What stays.** Starting from the layers, every dim of a value that features reach through
   operations that treat them one by one. At first all features there may go. Then those stay
   which something needs, and with them those that they are tied to, until nothing changes. So as
   much goes as can go, and for what stays the reason is known.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .constants import Known
from .dataflow import Dataflow, Operation, count_of, layer_dim, module_of, where
from .exports import LAYER, shape
from .norms import Norms
from .relations import Made, Place, Read, Relation, Saying
from .rules import Rule, belongs_to_attention, rule_of
from .tails import find_tails

Say = Callable[[Operation], tuple[Saying, ...]]


@dataclass(frozen=True)
class Solution:
    """What can go at given ks, and what can't.

    Attributes:
        stays: for each place that features reach, 0 for those that go, else the number of a reason.
        reasons: what needs them, and how.
        constants: what is known of the features at each place.
        reads: all reads of these places.
        tails: where the tails of the layers arrive, if what the model returns is to be cut.
    """

    stays: dict[Place, Tensor]
    reasons: list[tuple[str, str]]
    constants: "Constants"
    reads: list[Read]
    tails: dict[Place, Tensor]

    def gone(self, place: Place) -> Tensor:
        return self.stays[place] == 0


def solve(
    flow: Dataflow,
    say: Say,
    norms: Norms,
    ks: dict[str, int],
    whole: Collection[fx.Node] = (),
    outputs: bool = False,
) -> Solution:
    """What can go when the layers are set to `ks`.

    The dataflow does not tell a number that was written in the model's code from one that was
    read from a shape, and may be another when features go. Where that matters, the operations of
    these values are in `whole`: what they read and what they compute stays.

    What the model returns keeps its shape; with `outputs` the tails of the layers may go from it
    where they are zero.
    """
    constants = find_constants(flow, say, ks)
    ties = _reached(flow, say, ks)
    reads = _reads_of(flow, say, ties)
    kept = _Kept(flow, ties)
    tails = find_tails(flow, say, ks) if outputs else {}
    kept.add(_needs(flow, say, norms, ties))
    kept.add(_needs_of_outputs(flow, constants, ties, tails))
    kept.add(_needs_of_whole(flow, ties, whole))
    kept.add(_needs_of_tail_linears(flow, ties, ks))
    for read in reads:
        kept.add(_needs_of_read(flow, say, constants, read))
    kept.settle()
    while kept.add(_overlooked(flow, norms, kept.stays, ks)):
        kept.settle()
    return Solution(kept.stays, [("", ""), *kept.reasons], constants, reads, tails)


# ---------------------------------------------------------------------------- what is constant


@dataclass
class Constants:
    """What is known at each place.

    Attributes:
        known: of the places where anything is.
        lost: where nothing is known any more, though it was before: the operation that did it.
    """

    flow: Dataflow
    say: Say
    known: dict[Place, Known] = field(default_factory=dict)
    lost: dict[Place, str] = field(default_factory=dict)

    def at(self, place: Place) -> Known:
        n = count_of(place)
        if place not in self.known and self.flow.is_constant(place[0]) and n is not None:
            self.known[place] = _along(self.flow.constant(place[0]), place[1])
        return self.known.get(place) or Known.nothing(n or 0)

    def uniform(self, value: fx.Node) -> float | None:
        if self.flow.is_constant(value):
            entries = self.flow.constant(value).flatten()
            alike = len(entries) > 0 and bool((entries == entries[0]).all())
            return float(entries[0]) if alike else None
        for dim in range(len(shape(value))):
            known = self.known.get((value, dim))
            if known is not None and known.mask.all() and len(known.value.unique()) == 1:
                return float(known.value[0])
        return None

    def passes(self, operation: Operation, dim: int) -> list[tuple[Place, Tensor, Tensor]]:
        return [
            (source, labels, there)
            for relation in self.say(operation)
            if isinstance(relation, Relation)
            for source, labels, output, there in relation.passes(operation.output)
            if output == (operation.output, dim)
        ]


def _along(tensor: Tensor, dim: int) -> Known:
    """Of a parameter: the features that are equal along all other dims."""
    rows = (
        tensor.double().movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor.double()[:, None]
    )
    if rows.shape[1] == 0:
        return Known.nothing(len(rows))
    return Known.of((rows == rows[:, :1]).all(1), rows[:, 0])


def find_constants(flow: Dataflow, say: Say, ks: dict[str, int]) -> Constants:
    constants = Constants(flow, say)
    touched: set[fx.Node] = set()  # values of which something is known, or was
    for node, operation in flow.operations.items():
        rule = rule_of(operation)
        if (rule is not None and touched.intersection(operation.sources)) or (
            not operation.sources and rule is not None and rule.constants is not None
        ):
            for dim in range(len(shape(node))):
                _find_at(constants, operation, rule, dim)
        if operation.target is LAYER and operation.args[1] in ks:
            _add_tail(constants, (node, layer_dim(operation)), ks[operation.args[1]])
        places = [(node, dim) for dim in range(len(shape(node)))]
        if any(place in constants.known or place in constants.lost for place in places):
            touched.add(node)
    return constants


def _add_tail(constants: Constants, place: Place, k: int) -> None:
    before = constants.at(place)
    tail = torch.arange(len(before.mask)) >= k
    if tail.any():
        constants.known[place] = Known(before.mask | tail, before.value.masked_fill(tail, 0))


def _find_at(constants: Constants, operation: Operation, rule: Rule, dim: int) -> None:
    place = (operation.output, dim)
    if count_of(place) is None:
        return
    found = rule.constants(operation, dim, constants) if rule.constants else None
    if found is not None and found.mask.any():
        constants.known[place] = found
        return
    sources = [source for source, _, _ in constants.passes(operation, dim)]
    if any(source in constants.known for source in sources):
        constants.lost[place] = where(operation)
    for source in sources:
        if source in constants.lost:
            constants.lost[place] = constants.lost[source]


# --------------------------------------------------------------------------------- what stays


@dataclass(frozen=True)
class _Need:
    """Features at a place stay (all of them for None), since `name` does or is what `text` says."""

    place: Place
    features: Tensor | None
    name: str
    text: str


class _Kept:
    """The features that stay, by place, and why."""

    def __init__(self, flow: Dataflow, ties: dict[Place, list[Relation]]) -> None:
        self.ties = ties
        self.stays = {place: torch.zeros(count_of(place) or 0, dtype=torch.int64) for place in ties}
        self.reasons: list[tuple[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def add(self, needs: Iterable[_Need]) -> bool:
        """Whether any of them was new."""
        return sum(self._add(need) for need in needs) > 0

    def _add(self, need: _Need) -> bool:
        stays = self.stays[need.place]
        new = stays == 0 if need.features is None else (stays == 0) & need.features
        if not new.any():
            return False
        reason = (need.name, need.text)
        if reason not in self._numbers:
            self.reasons.append(reason)
            self._numbers[reason] = len(self.reasons)
        stays[new] = self._numbers[reason]
        return True

    def settle(self) -> None:
        """Features that are tied to ones that stay, stay too."""
        waiting = dict.fromkeys(tie for ties in self.ties.values() for tie in ties)
        while waiting:
            tie = next(iter(waiting))
            del waiting[tie]
            for place, why in _consequences(self.stays, tie):
                stays = self.stays[place]
                new = (stays == 0) & (why > 0)
                if new.any():
                    stays[new] = why[new]
                    waiting.update(dict.fromkeys(self.ties[place]))


def _consequences(stays: dict[Place, Tensor], tie: Relation) -> Iterator[tuple[Place, Tensor]]:
    """What stays at the parts because of the whole, and at the whole because of the parts."""
    whole = stays[tie.whole]
    whole_stays, reason = torch.ones(len(whole), dtype=torch.bool), torch.zeros_like(whole)
    for part in tie.parts:
        labels, there = part.labels + 1, part.labels_of_whole + 1  # 0: belongs to nothing
        count = 1 + int(torch.cat([labels, there, torch.zeros(1).long()]).max())
        by_whole, by_part = torch.zeros(2, count, dtype=torch.int64)
        by_whole.scatter_reduce_(0, there, whole, "amax")
        by_part.scatter_reduce_(0, labels, stays[part.place], "amax")
        by_whole[0] = by_part[0] = 0
        yield part.place, by_whole[labels]
        whole_stays &= by_part[there] > 0
        if not reason.any() or not (stays[part.place] > 0).all():
            reason = by_part[there]  # the one that decides
    yield tie.whole, reason * whole_stays


def _ties(said: tuple[Saying, ...]) -> list[Relation]:
    relations = [s.tie if isinstance(s, Read) else s for s in said]
    return [relation for relation in relations if isinstance(relation, Relation)]


def _operations_at(flow: Dataflow, node: fx.Node) -> list[Operation]:
    """The one that computes the value, and those that read it."""
    own = flow.operations.get(node)
    return [*([] if own is None else [own]), *flow.users[node]]


def _reached(flow: Dataflow, say: Say, ks: dict[str, int]) -> dict[Place, list[Relation]]:
    """All places that the features of the layers reach, and what each is tied by."""
    ties: dict[Place, list[Relation]] = {}
    queue: deque[Place] = deque()
    for operation in flow.calls():
        if operation.args[1] in ks:
            dim = layer_dim(operation)
            queue += [(operation.output, dim), (operation.args[0], dim)]
    while queue:
        place = queue.popleft()
        if place in ties:
            continue
        ties[place] = []
        for operation in _operations_at(flow, place[0]):
            for relation in _ties(say(operation)):
                if place in relation.places:
                    ties[place].append(relation)
                    queue += relation.places
    return ties


def _reads_of(flow: Dataflow, say: Say, reached: dict[Place, list[Relation]]) -> list[Read]:
    operations = dict.fromkeys(o for node, _ in reached for o in _operations_at(flow, node))
    return [
        read
        for operation in operations
        for read in say(operation)
        if isinstance(read, Read) and all(place in reached for place in read.tie.places)
    ]


def _needs(
    flow: Dataflow, say: Say, norms: Norms, reached: dict[Place, list[Relation]]
) -> Iterator[_Need]:
    """What needs features by itself, whatever becomes of others."""
    for place in reached:
        node, _ = place
        own = flow.operations.get(node)
        if node in flow.names:
            if not flow.names[node]:
                name = f"the constant {node.name!r}"
                yield _Need(place, None, name, "is no parameter or buffer")
            if belongs_to_attention(flow, node):
                name = " = ".join(flow.names[node])
                yield _Need(
                    place, None, name, "nn.MultiheadAttention can't have it in another size"
                )
        elif own is None:
            name = f"the input {node.name!r} of the model"
            yield _Need(place, None, name, "comes from outside")
        else:
            said = say(own)
            if not any(isinstance(s, Relation) and place in s.places for s in said):
                yield _Need(place, None, where(own), "computes all features or none")
            for made in said:
                if isinstance(made, Made) and made.place == place:
                    text = "computes these features by itself"
                    yield _Need(place, made.features, where(own), text)
        for user in flow.users[node]:
            if not any(place in tie.places for tie in _ties(say(user))):
                yield _Need(place, None, where(user), norms.refused.get(user) or _mixes(user))
        if flow.is_constant(node):
            text = "takes some of them by their number, and may take these at other sizes"
            yield from (
                _Need(place, rest, where(user), text) for user, rest in _untaken(flow, place)
            )


def _untaken(flow: Dataflow, place: Place) -> Iterator[tuple[Operation, Tensor]]:
    """What no operation takes of a parameter, or of what is computed from some: by the last."""
    node, dim = place
    rest = torch.ones(count_of(place) or 0, dtype=torch.bool)
    for user in flow.users[node]:
        rule = rule_of(user)
        taken = rule.takes(user).get(dim) if rule is not None and rule.takes is not None else None
        if taken is None:
            return
        numbers = taken(len(rest))
        rest[numbers[numbers >= 0]] = False
    if flow.users[node]:
        yield flow.users[node][-1], rest


def _needs_of_outputs(
    flow: Dataflow, constants: Constants, reached: Iterable[Place], tails: dict[Place, Tensor]
) -> Iterator[_Need]:
    """Of what is returned only zeros can go, and only those of the tails."""
    for place in reached:
        if place[0] not in flow.returned:
            continue
        if place in tails:
            goes = tails[place]
            if place in constants.lost:
                text = "makes them differ from sample to sample, and the model returns them"
                yield _Need(place, goes, constants.lost[place], text)
            text = "has other features there than zeros"
            yield _Need(place, goes & ~constants.at(place).zero, "the output of the model", text)
        rest = ~tails[place] if place in tails else None
        yield _Need(place, rest, "the output of the model", "must keep its shape")


def _mixes(operation: Operation) -> str:
    return (rule_of(operation) or Rule(lambda operation: ())).mixes


def _needs_of_whole(
    flow: Dataflow, reached: Iterable[Place], whole: Collection[fx.Node]
) -> Iterator[_Need]:
    for place in reached:
        for operation in _operations_at(flow, place[0]):
            if operation.output in whole:
                text = "has sizes in the model's code, which pruning would change"
                yield _Need(place, None, where(operation), text)


def _needs_of_tail_linears(
    flow: Dataflow, reached: Collection[Place], ks: dict[str, int]
) -> Iterator[_Need]:
    """Those that have no k stay what they are: their biases are for each number of features."""
    for operation in flow.calls():
        place, name = (operation.output, layer_dim(operation)), operation.args[1]
        if place in reached and name not in ks and name in flow.tail_linears.values():
            text = "is that of a TailLinear, which has a bias for each number of its features"
            yield _Need(place, None, where(operation), f"{text}: prune it too, to k or to n")


def _needs_of_read(flow: Dataflow, say: Say, constants: Constants, read: Read) -> Iterator[_Need]:
    """Features that are not constant, and those whose constant has no place to go."""
    can_go = _removable(flow, say, constants, read)
    for other in say(read.operation):
        if isinstance(other, Read) and (other.place, other.weight) == (read.weight, read.place):
            # a product: zeros in one factor are enough
            can_go = can_go | _removable(flow, say, constants, other)
    known = constants.known.get(read.place)
    if known is not None:
        text = "can't take in the constants that it reads there: it has zeros at the border, "
        text += "or no bias of its own"
        yield _Need(read.place, known.mask & ~can_go, where(read.operation), text)
    if read.place in constants.lost:
        text = f"makes them differ from sample to sample, and {where(read.operation)} reads them"
        yield _Need(read.place, ~can_go, constants.lost[read.place], text)
    text = "reads them too, where they are not constant"
    yield _Need(read.place, ~can_go, where(read.operation), text)


def _removable(flow: Dataflow, say: Say, constants: Constants, read: Read) -> Tensor:
    """The features that add nothing, or a constant that can go into the bias."""
    known = constants.at(read.place)
    if known.value.any() and not _foldable(flow, say, constants, read, known):
        return known.zero
    return known.mask


def _foldable(flow: Dataflow, say: Say, constants: Constants, read: Read, known: Known) -> bool:
    """Whether what the constants add is the same everywhere, and there is a bias for it."""
    if (
        read.weight is None
        or name_of_bias(flow, read) is None
        or contribution(flow, read, known.value) is None
    ):
        return False
    users = list(flow.users[read.weight[0]])
    if isinstance(read.bias, fx.Node):
        users += flow.users[read.bias]
    for user in users:  # called several times: each must read the same constants
        reads = [s for s in say(user) if isinstance(s, Read) and s.weight == read.weight]
        others = [constants.known.get(other.place) for other in reads]
        if not others or any(o is None or not torch.equal(o.value, known.value) for o in others):
            return False
    return True


def contribution(flow: Dataflow, read: Read, values: Tensor) -> Tensor | None:
    """What constant features add to each output; None where that differs from place to place."""
    rule = rule_of(read.operation)
    if read.weight is None or rule is None or rule.fold is None:
        return None
    weight, dim = read.weight
    if not flow.is_constant(weight):
        return None
    return rule.fold(read.operation, flow.constant(weight).movedim(dim, -1) @ values)


def name_of_bias(flow: Dataflow, read: Read) -> str | None:
    """The parameter that takes in a constant, or the one to be made; None if there is no place."""
    if isinstance(read.bias, fx.Node):
        names = flow.names.get(read.bias, [])
        return names[0] if len(names) == 1 else None
    names = flow.names.get(read.weight[0], []) if read.weight else []
    owner, _, attribute = names[0].rpartition(".") if names else ("", "", "")
    if attribute != "weight" or module_of(read.operation) != owner:
        return None
    module = flow.model.get_submodule(owner)
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None:
        return names[0].removesuffix("weight") + "bias"
    return None


# -------------------------------------------------------------------------- what is seen later


def _overlooked(
    flow: Dataflow, norms: Norms, stays: dict[Place, Tensor], ks: dict[str, int]
) -> Iterator[_Need]:
    """What stays since other features go."""
    for place, kept in stays.items():
        gone = kept == 0
        if not gone.any():
            continue
        for operation in _operations_at(flow, place[0]):
            rule = rule_of(operation)
            if rule is None:
                continue
            if gone.all() and not rule.runs_on_nothing:
                first = torch.arange(len(gone)) == 0
                text = "can't be run by torch on no features"
                yield _Need(place, first, where(operation), text)
            step = max(1, rule.alignment // place[0].meta["val"].dtype.itemsize)
            if missing := -int((~gone).sum()) % step:
                some = gone & (gone.cumsum(0) <= missing)
                text = f"is run by torch on multiples of {step} features only"
                yield _Need(place, some, where(operation), text)
            if rule.takes is not None and not _takes_the_same(operation, rule, stays):
                text = "takes features by their number, which pruning would change"
                yield _Need(place, None, where(operation), text)
    for norm, text in norms.needs(stays):
        yield _Need(norm.place, None, where(norm.operation), text)
    calls = [o for o in flow.calls() if o.args[1] in ks]
    for operation in calls:
        yield _a_prefix(operation, stays, ks[operation.args[1]])
    for name in ks:
        places = [(o.output, layer_dim(o)) for o in calls if o.args[1] == name]
        anywhere = torch.stack([stays[place] for place in places]).any(0)
        text = "is called several times, and hands on the same features each time"
        for place in places:
            yield _Need(place, anywhere, f"layer {name!r}", text)


def _a_prefix(operation: Operation, stays: dict[Place, Tensor], k: int) -> _Need:
    """What a layer keeps are its first features still, so that a smaller k means the same."""
    place = (operation.output, layer_dim(operation))
    last = max(stays[place][:k].nonzero().flatten().tolist(), default=-1)
    first = torch.arange(len(stays[place])) <= last
    return _Need(place, first, where(operation), "keeps its first features without a gap")


def _takes_the_same(operation: Operation, rule: Rule, stays: dict[Place, Tensor]) -> bool:
    """Whether the numbers in the code still mean what they should, of the features that are left."""
    assert rule.takes is not None
    source, output = operation.args[0], operation.output
    missing = len(shape(output)) - len(shape(source))
    for dim, taken in rule.takes(operation).items():
        place, out_place = (source, dim), (output, dim + missing)
        if place not in stays or out_place not in stays or taken is None:
            continue
        kept, out_kept = (stays[p].nonzero().flatten() for p in (place, out_place))
        try:
            left = taken(len(kept))
        except (RuntimeError, IndexError):
            return False
        expected = taken(len(stays[place]))[out_kept]
        actual = torch.where(left < 0, -1, kept[left.clamp(min=0)]) if len(kept) else left
        if not torch.equal(actual, expected):
            return False
    return True
