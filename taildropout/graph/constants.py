"""What is constant.

Forwards from the layers: behind a layer the tail is zero, behind a sigmoid it is 0.5; in any case
the same in every sample and at every position. What reads such features can do without them: their
contribution, a constant, goes into its bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..models.copies import PruningError
from .dataflow import LAYER, Graph, Operation, layer_dim, module_of, shape, where
from .relations import Place, Read, Rules
from .rules import is_recurrent, moves, rules_of, zeros_make_zeros


class _RulesOfAll:
    """The rules of every operation, found when asked for."""

    def __init__(self, graph: Graph, ks: dict[str, int]) -> None:
        self._graph, self._ks = graph, ks
        self._rules: dict[Operation, Rules] = {}

    def __getitem__(self, operation: Operation) -> Rules:
        if operation not in self._rules:
            self._rules[operation] = rules_of(self._graph, operation, self._ks)
        return self._rules[operation]


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
