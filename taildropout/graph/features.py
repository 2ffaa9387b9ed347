"""Which features of which value can go.

Starting from the layers, every dim of a value that features reach through operations that treat
them one by one. At first all features there may go. Then those stay which something needs, and with
them those that they are tied to, until nothing changes. So as much goes as can go, and for what
stays the reason is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .constants import _Constants, _Known, _RulesOfAll, contribution, name_of_bias
from .dataflow import LAYER, Graph, Operation, layer_dim, shape, where
from .relations import Place, Read, Relation
from .rules import belongs_to_attention, has_sizes, runs_on_no_features, takes_by_number


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
        if (
            operation.target is torch.ops.aten.split.Tensor
        ):  # from chunk: as many parts, of the new size
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
