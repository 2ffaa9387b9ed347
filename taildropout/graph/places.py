"""Where a width can be chosen: features of which the tail can go on both sides, at every k.

The model is read once, with a layer at the input and at the output of every module that has
parameters of its own. A layer without a k passes everything on, so the dataflow can be asked of
any of them, alone or together with others, what goes if these have one. It is read at the sizes of
the example only: what is found is a candidate still, for a plan that knows all paths to confirm.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx, nn

from ..layers import TailDropout
from ..models.copies import structural_copy, without_cache
from ..models.inputs import Inputs
from .dataflow import Dataflow, Operation, count_of, layer_dim
from .exports import LAYER, shape
from .features import Solution, solve
from .norms import Norms
from .relations import Place, Read, Relation
from .rules import Sayings, is_known, rule_of

aten = torch.ops.aten

_ATTENTION = {
    *(aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default),
}
_EMBEDDINGS = {aten.embedding.default}

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Position:
    """Where a TailDropout can stand.

    Attributes:
        module: qualified name of the module.
        at: "input" or "output" of it.
        dropout_dim: along which the features lie there.
        batch_dim: along which the samples of the model's input lie, each with one row or several.
        one_row: each has one.
    """

    module: str
    at: Side
    dropout_dim: int
    batch_dim: int
    one_row: bool

    def __str__(self) -> str:
        return f"{self.at} of {self.module or 'the model'}"


@dataclass(frozen=True, eq=False)
class Found:
    """Features of which the first k can be kept, and all others cut, wherever they are.

    Attributes:
        positions: where layers with this k must stand for that.
        n: how many features there are.
        multiple_of: what every k is a multiple of.
        kind: what they are, in a word.
        parameters: how many go at the smallest k.
        goes: the features that go then, at each place where any does.
    """

    positions: tuple[Position, ...]
    n: int
    multiple_of: int
    kind: str
    parameters: int
    goes: dict[Place, Tensor]

    @property
    def groups(self) -> int:
        return self.n // self.multiple_of


def find_places(model: nn.Module, example_inputs: Inputs) -> tuple[list[Found], dict[str, str]]:
    """All that is found in a model, in the order of computation; and elsewhere, why nothing is.

    Of features that are parts of each other, as a channel holds positions, those are taken of which
    there are fewest; the parts of a concatenation are taken each by itself.

    Raises:
        PruningError: the model can't be exported.
    """
    probes = _Probes(model, example_inputs)
    found: list[Found] = []
    others: dict[str, str] = {}
    # What can't go alone, by its reader, and all that it is tied to.
    apart: dict[str, set[Place]] = {}
    for alike in probes.classes():
        n = probes.n[alike[0]]
        if probes.cover([one for one in found if one.n <= n], alike):
            continue
        result, tied = _place_of(probes, alike)
        if isinstance(result, Found):
            found.append(result)
            continue
        others[alike[0]] = result
        if len(readers := _readers(probes, alike)) == 1:
            apart[readers[0]] = tied
    together = (_found(probes, names) for names in _together(probes, apart))
    found += [one for one in together if one is not None]
    chosen: list[Found] = []
    for one in sorted(found, key=lambda one: one.groups):
        if not any(_overlap(one.goes, other.goes) for other in chosen):
            chosen.append(one)
    order = {name: i for i, name in enumerate(probes.positions)}
    chosen.sort(key=lambda one: order[probes.name_of(one.positions[0])])
    nowhere = {
        str(probes.positions[name]): reason
        for name, reason in sorted(others.items(), key=lambda item: order[item[0]])
        if not probes.cover(chosen, [name])
    }
    for name in probes.never_called():
        nowhere[f"input of {name}"] = _why_never_called(model, name)
    return chosen, nowhere


def _why_never_called(model: nn.Module, name: str) -> str:
    owner = type(model.get_submodule(name.rpartition(".")[0]))
    reason = (
        f"{owner.__name__} computes it as a function, and a layer can only stand where a module is "
        "called"
    )
    if issubclass(owner, nn.MultiheadAttention):
        reason += ": write the attention with Linear modules for its heads to be a place"
    return reason


def _together(probes: "_Probes", apart: Mapping[str, set[Place]]) -> Iterator[list[str]]:
    """Readers of as many features each, which are tied: heads that share a bias, say."""
    left = dict(apart)
    while left:
        name, tied = next(iter(left.items()))
        some = [
            other
            for other in left
            if probes.n[other] == probes.n[name] and tied.issuperset(probes.places([other]))
        ]
        left = {other: left[other] for other in left if other not in some and other != name}
        if len(some) > 1:
            yield some


def _overlap(goes: Mapping[Place, Tensor], others: Mapping[Place, Tensor]) -> bool:
    return any(
        place in others and bool((gone & others[place]).any()) for place, gone in goes.items()
    )


# ------------------------------------------------------------------------- what is asked for k


class _Probes:
    """A model with layers wherever one might stand, and what its dataflow says of them.

    Attributes:
        positions: of each layer by its name, in the order of computation.
        standing: the module of each, and whether it is at its input or its output.
        calls: of each of them.
        n: their numbers of features.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
        probed, self.standing = _probed(model)
        self.flow = Dataflow(probed, example_inputs, is_known, most_paths=1)
        self.calls: dict[str, list[Operation]] = {}
        for operation in self.flow.calls():
            turned = _turned(self.flow, operation)
            self.calls.setdefault(turned.args[1], []).append(turned)
        self.norms = Norms(self.flow, example_inputs)
        self._sayings = Sayings(self.norms)
        self.say = self._sayings.at({})
        self.n, self.positions = {}, {}
        for name, calls in self.calls.items():
            counts = {count_of((call.output, layer_dim(call))) for call in calls}
            n = counts.pop()
            if name in self.standing and n is not None and not counts:
                self.n[name] = n
                self.positions[name] = _position(self.flow, *self.standing[name], calls[0])
        self._last: tuple[dict[str, int], Solution] | None = None
        self._names = {position: name for name, position in self.positions.items()}

    def name_of(self, position: Position) -> str:
        return self._names[position]

    def never_called(self) -> Iterator[str]:
        """Modules whose parameters are used, and by no call of a module."""
        called = {self.standing[probe][0] for probe in self.calls if probe in self.standing}
        owners: list[str] = []
        for node, names in self.flow.names.items():
            some = [name.rpartition(".")[0] for name in names]
            if self.flow.users[node] and called.isdisjoint(some):
                owners += some
        modules = dict.fromkeys(module for module, _ in self.standing.values())
        yield from (module for module in modules if module and module in owners)

    def places(self, names: Iterable[str]) -> list[Place]:
        """What they hand on."""
        return [(call.output, layer_dim(call)) for name in names for call in self.calls[name]]

    def cover(self, found: Iterable[Found], names: Iterable[str]) -> bool:
        """Whether any of their features goes with one of these."""
        places = self.places(names)
        return any(place in one.goes for one in found for place in places)

    def classes(self) -> Iterator[list[str]]:
        """Layers of the same features: what reads them first where that is all that does."""
        seen: set[Place] = set()
        waiting = list(self.positions)
        found = []
        for name in waiting:
            places = self.places([name])
            if seen.issuperset(places):
                continue
            reached = _same_features(self, places)
            seen |= reached
            alike = [other for other in waiting if reached.intersection(self.places([other]))]
            found.append([other for other in alike if self.n[other] == self.n[name] > 1])
        yield from sorted(filter(None, found), key=lambda alike: len(_readers(self, alike)) != 1)

    def solve(self, names: Iterable[str], k: int) -> Solution:
        """What goes if these layers have this k, and all others none."""
        ks = dict.fromkeys(names, k)
        if self._last is None or self._last[0] != ks:
            self._last = ks, solve(self.flow, self._sayings.at(ks), self.norms, ks)
        return self._last[1]

    def left(self, found: Solution, names: Iterable[str]) -> int:
        """How many of the first features stay in front of these layers, or behind them."""
        stays = torch.stack([found.stays[place] > 0 for place in self._sides(names)]).any(0)
        return max((1 + i for i in stays.nonzero().flatten().tolist()), default=0)

    def why(self, found: Solution, names: Iterable[str]) -> str:
        """Why features stay there: of the last ones, and the first reason."""
        for place in self._sides(names):
            number = int(found.stays[place][-1])
            if number:
                return " ".join(found.reasons[number])
        return ""

    def _sides(self, names: Iterable[str]) -> Iterator[Place]:
        for name in names:
            for call in self.calls[name]:
                yield call.args[0], layer_dim(call)
                yield call.output, layer_dim(call)


def _probed(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[str, Side]]]:
    """A copy with layers at modules with parameters of their own; of their names, the positions."""
    copied = copy.deepcopy(structural_copy(model), _generic_tensors(model))
    standing: dict[str, tuple[str, Side]] = {}
    sides: tuple[Side, Side] = ("input", "output")
    for name, module in list(copied.named_modules()):
        has_own = any(p is not None for p in module._parameters.values())
        if not has_own and not hasattr(module, "parametrizations"):
            continue
        if "parametrizations" in name.split(".") or type(module).forward is nn.Sequential.forward:
            continue
        for at in sides:
            child = f"_{at}_probe"
            standing[f"{name}.{child}".lstrip(".")] = name, at
            module.add_module(child, TailDropout())
        module.register_forward_pre_hook(_probe_input)
        module.register_forward_hook(_probe_output)
    return without_cache(copied), standing


def _generic_tensors(model: nn.Module) -> dict[int, Any]:
    """What training will change keeps no number that only the first steps have: a bias of zeros."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    of_norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    statistics = {id(b) for m in of_norms for b in m._buffers.values() if b is not None}
    for tensor in [*model.parameters(), *model.buffers()]:
        tensors[id(tensor)] = tensor
        may_change = isinstance(tensor, nn.Parameter) or id(tensor) in statistics
        if may_change and tensor.is_floating_point() and _is_uniform(tensor):
            values = 1 + torch.rand(tensor.shape, generator=generator)
            values = values.to(tensor.device, tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(values, False) if is_parameter else values
    return tensors


def _is_uniform(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _probe_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_probe(module._input_probe, args[0]), *args[1:]) if args else args


def _probe_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (_probe(module._output_probe, output[0]), *output[1:]) if output else output
    return _probe(module._output_probe, output)


def _probe(layer: nn.Module, value: Any) -> Any:
    can_drop = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return layer(value) if can_drop else value


# ------------------------------------------------------------------------------------ positions


def _turned(flow: Dataflow, operation: Operation) -> Operation:
    """The call of a layer, along the dim that parameters lie along: where they are read or made."""
    input, name, dim, size = operation.args
    along = [
        _dim_of_parameters(flow, user, operation.output) for user in flow.users[operation.output]
    ]
    own = flow.operations.get(input)
    along += [] if own is None else [_dim_of_parameters(flow, own, input)]
    if name.endswith("_output_probe"):
        along.reverse()
    dims = [d for d in along if d is not None]
    turned = replace(operation, args=(input, name, dims[0] if dims else dim, size))
    flow.operations[operation.output] = turned
    flow.users[input] = [turned if user is operation else user for user in flow.users[input]]
    return turned


def _dim_of_parameters(flow: Dataflow, operation: Operation, value: fx.Node) -> int | None:
    """The dim of a value that parameters lie along, by one operation that reads or computes it."""
    if operation.target is LAYER:
        return None
    said = _said(operation)
    dims = [s.place[1] for s in said if isinstance(s, Read) and s.place[0] is value and s.weight]
    of_output: dict[int, int] = {}  # dims of its output, and of the value there
    of_parameters: set[int] = set()
    for relation in said:
        for (node, dim), _, (out, out_dim), _ in (
            relation.passes(operation.output) if isinstance(relation, Relation) else ()
        ):
            if out is operation.output and flow.is_constant(node):
                of_parameters.add(out_dim)
            elif out is operation.output and node is value:
                of_output[out_dim] = dim
    if value is operation.output:
        return max(of_parameters, default=None)
    dims += [of_output[d] for d in sorted(of_parameters, reverse=True) if d in of_output]
    return dims[0] if dims else None


def _said(operation: Operation) -> list[Any]:
    rule = rule_of(operation)
    return [] if rule is None else list(rule.says(operation))


def _position(flow: Dataflow, module: str, at: Side, call: Operation) -> Position:
    sizes, dim = shape(call.output), layer_dim(call)
    samples = next(
        (shape(node)[0] for node in flow.paths.exports[0].placeholders if shape(node)), 1
    )
    is_symbol = isinstance(samples, sympy.Symbol)  # else another dim may be of the same size
    along = [d for d, size in enumerate(sizes) if size == samples and (is_symbol or d == 0)]
    is_last = dim == len(sizes) - 1
    return Position(module, at, -1 if is_last else dim, along[0] if along else 0, len(along) > 0)


def _same_features(probes: _Probes, places: Iterable[Place]) -> set[Place]:
    """All places of the same features, one by one."""
    waiting, reached = list(places), set[Place]()
    while waiting:
        place = waiting.pop()
        if place in reached:
            continue
        reached.add(place)
        own = probes.flow.operations.get(place[0])
        for operation in [*([] if own is None else [own]), *probes.flow.users[place[0]]]:
            for said in probes.say(operation):
                tie = said.tie if isinstance(said, Read) else said
                if isinstance(tie, Relation) and place in tie.places and _one_by_one(tie):
                    waiting += tie.places
    return reached


def _one_by_one(tie: Relation) -> bool:
    return len(tie.parts) == 1 and torch.equal(tie.parts[0].labels, tie.parts[0].labels_of_whole)


# ----------------------------------------------------------------------------- of one class


def _readers(probes: _Probes, alike: list[str]) -> list[str]:
    """The inputs of modules whose outputs are other features."""
    passed_on = {probes.positions[name].module for name in alike if not _is_input(probes, name)}
    return [
        name
        for name in alike
        if _is_input(probes, name) and probes.positions[name].module not in passed_on
    ]


def _is_input(probes: _Probes, name: str) -> bool:
    return probes.positions[name].at == "input"


def _place_of(probes: _Probes, alike: list[str]) -> tuple[Found | str, set[Place]]:
    """What layers of the same features could do together, or why nothing; and what is tied to them.

    Where one module reads them all, one layer does. Else those that write them get one each, or
    those that read them.
    """
    readers = _readers(probes, alike)
    writers = [name for name in alike if not _is_input(probes, name)]
    reason, tied = "", set[Place]()
    for names in ([readers] if len(readers) == 1 else []) + [writers, readers]:
        if names and (found := _found(probes, names)) is not None:
            already = _layers_among(probes, found)
            return (f"layer {already!r} chooses their width already" if already else found), tied
        if names and not reason:
            solution = probes.solve(names, probes.n[names[0]] // 2)
            reason, tied = probes.why(solution, names), set(solution.stays)
    return reason or "go together at some ks only", tied


def _layers_among(probes: _Probes, found: Found) -> str:
    """A layer of the model's own of the same features."""
    for name, calls in probes.calls.items():
        if name not in probes.standing:
            for call in calls:
                if (call.output, layer_dim(call)) in found.goes:
                    return name
    return ""


def _found(probes: _Probes, names: list[str]) -> Found | None:
    """What the layers do together, or as few of them as do the same."""
    multiple_of = _multiple_of(probes, names)
    if multiple_of is None:
        return None
    few = names if len(names) == 1 else _fewest(probes, names, multiple_of)
    solution = probes.solve(few, multiple_of)
    goes = {place: stays == 0 for place, stays in solution.stays.items() if (stays == 0).any()}
    return Found(
        tuple(probes.positions[name] for name in few),
        probes.n[names[0]],
        multiple_of,
        _kind(probes, few, multiple_of, goes),
        _parameters(probes, goes),
        goes,
    )


def _multiple_of(probes: _Probes, names: list[str]) -> int | None:
    """The smallest number of which all multiples are left as they are; None if there is none."""
    n = probes.n[names[0]]
    left: dict[int, int] = {}

    def stay(k: int) -> int:
        if k not in left:
            left[k] = probes.left(probes.solve(names, k), names)
        return left[k]

    if stay(n // 2) == n:
        return None
    step = 1
    if stay(n - 1) == n:
        # Features go in groups: where does the one that k is in end, and the next?
        end = stay(n // 2 + 1)
        step = n // 2 if end == n else math.gcd(n, stay(end + 1) - end)
    checked = (n - step, n // step // 2 * step, step)
    return step if step < n and n % step == 0 and all(stay(k) <= k for k in checked) else None


def _fewest(probes: _Probes, names: list[str], k: int) -> list[str]:
    """As few of them as do the same: none behind zeros, and none in front of others alone."""
    found = probes.solve(names, k)
    zero = {
        name: all(
            found.constants.at((call.args[0], layer_dim(call))).zero[k:].all()
            for call in probes.calls[name]
        )
        for name in names
    }
    first = [name for name in names if not zero[name]]
    calls = {call.output for name in first for call in probes.calls[name]}
    few = [
        name for name in first if any(_is_needed(probes, p, calls) for p in probes.places([name]))
    ]
    for some in (few, first):
        if some and probes.left(probes.solve(some, k), some) <= k:
            return some
    return names


def _is_needed(probes: _Probes, place: Place, layers: set[fx.Node]) -> bool:
    """Whether anything but these layers takes the features."""
    waiting, seen = [place], set[Place]()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if place[0] in probes.flow.returned:
            return True
        for user in probes.flow.users[place[0]]:
            if user.output in layers:
                continue
            behind = [
                out
                for said in probes.say(user)
                if isinstance(said, Relation)
                for source, _, out, _ in said.passes(user.output)
                if source == place
            ]
            if not behind:
                return True
            waiting += behind
    return False


def _kind(probes: _Probes, names: list[str], multiple_of: int, goes: Mapping[Place, Tensor]) -> str:
    """What they are, by the operations that they go through."""
    operations = {
        operation.target
        for node, _ in goes
        for operation in [probes.flow.operations.get(node), *probes.flow.users[node]]
        if operation is not None
    }
    if multiple_of > 1 and operations & _ATTENTION:
        return "heads"
    if len(names) > 1:
        return "stream"
    if any(len(shape(node)) > 2 for node, _ in goes if probes.flow.names.get(node)):
        return "channels"
    return "embedding" if operations & _EMBEDDINGS else "hidden"


def _parameters(probes: _Probes, goes: Mapping[Place, Tensor]) -> int:
    parameters = {name for name, _ in probes.flow.model.named_parameters(remove_duplicate=False)}
    kept: dict[fx.Node, Fraction] = {}
    for (node, _), gone in goes.items():
        if parameters.intersection(probes.flow.names.get(node, [])):
            share = Fraction(int((~gone).sum()), len(gone))
            kept[node] = kept.get(node, Fraction(1)) * share
    return sum(int(node.meta["val"].numel() * (1 - share)) for node, share in kept.items())
