"""Root mean square norms: how one over features, some of them zeros, is one over the others.

    weight * x / sqrt(mean(x²) + eps)

Of n features let n - m be zeros. The mean over the m others is n / m times as large, so the norm
over these is the same with `eps * n / m` and `weight * sqrt(n / m)` (Zhang and Sennrich 2019, Root
Mean Square Layer Normalization, has the norm; the rest is arithmetic). It is recognised by its
operations, not by its class: the mean of squares along one dim, eps, the root, and a weight that
all that the root divides is multiplied by. Where there is no such weight, the matrices of the
Linears behind do as well. LayerNorm subtracts a mean, which zeros take part in.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..models.fakes import without_numbers
from ..models.inputs import Inputs, call
from .dataflow import Dataflow, Operation, count_of, module_of
from .exports import LAYER, shape
from .relations import Place, Saying, dims_alike, read, same

aten = torch.ops.aten

_CASTS = {
    *(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
    *(aten.type_as.default, aten.clone.default, aten.contiguous.default, aten.alias.default),
    *(aten.detach.default, aten.dropout.default),
}
_MOVES = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
    *(aten.transpose.int, aten.permute.default, aten.expand.default, aten.slice.Tensor),
    *(aten.select.int, aten.t.default),
}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.true_divide.Tensor}
_SUMS = {aten.add.Tensor, aten.add.Scalar}


@dataclass(frozen=True, eq=False)
class Factor:
    """A weight that takes in a factor: it, or `plus` and it, multiplies what has the factor."""

    weight: fx.Node
    plus: float
    reader: Operation  # of the weight


@dataclass(frozen=True, eq=False)
class Norm:
    """One root mean square norm.

    Attributes:
        operation: the mean of the squares, or all of the norm.
        place: the features that are averaged, or their squares.
        factors: the weights that take in a factor of its output, together.
        eps: what is added to the mean. None: torch's for the dtype.
        adds: what adds it, if anything does.
    """

    operation: Operation
    place: Place
    factors: tuple[Factor, ...]
    eps: float | None
    adds: Operation | None


@dataclass(frozen=True)
class Holder:
    """The attribute of a module that eps is read from."""

    module: str
    attribute: str


class Norms:
    """All root mean square norms of a model.

    Attributes:
        found: by the operation that averages.
        refused: means of squares that look like one, and why they need all features.
    """

    def __init__(self, flow: Dataflow, example_inputs: Inputs) -> None:
        self.flow = flow
        self.example_inputs = example_inputs
        self.found: dict[Operation, Norm] = {}
        self.refused: dict[Operation, str] = {}
        for operation in flow.operations.values():
            norm = _norm_at(operation)
            if isinstance(norm, Norm):
                self.found[operation] = norm
            elif norm is not None:
                self.refused[operation] = norm

    def say(self, operation: Operation) -> Iterator[Saying]:
        """The mean over what is left, once it is rescaled, is what it was."""
        norm = self.found.get(operation)
        if norm is None:
            return
        yield from read(operation, norm.place)
        if operation.target is aten.rms_norm.default:
            yield from dims_alike(operation.args[0], operation.output, [norm.place[1]])
            weight = operation.arg(2, "weight")
            if weight is not None:
                yield from same((weight, 0), (operation.output, norm.place[1]))

    def holder(self, norm: Norm) -> Holder | None:
        return self._holders.get(norm.operation)

    def counts(self, norm: Norm, stays: Mapping[Place, Tensor]) -> tuple[int, int]:
        """How many features it averages, and how many of them stay."""
        n = count_of(norm.place)
        assert n is not None
        kept = stays.get(norm.place)
        return n, n if kept is None else int((kept > 0).sum())

    def needs(self, stays: Mapping[Place, Tensor]) -> Iterator[tuple[Norm, str]]:
        """The norms that need all features after all, and why."""
        counts = {norm: self.counts(norm, stays) for norm in self.found.values()}
        for norm, (n, m) in counts.items():
            if n == m:
                continue
            holder = self.holder(norm)
            if norm.adds is not None and holder is None:
                yield norm, "adds an eps that no attribute of its module holds for it alone"
                continue
            for factor in norm.factors:
                sharing = self._sharing.get(factor.weight, {})
                if set(self.flow.users[factor.weight]) != set(sharing):
                    yield norm, f"has the weight {self._name(factor)}, which is used elsewhere too"
                elif any(counts[other] != (n, m) for other in sharing.values()):
                    yield norm, f"shares {self._name(factor)} with norms of other features"
            others = [o for o in counts if holder is not None and self.holder(o) == holder]
            if any(counts[other] != (n, m) for other in others):
                yield norm, "shares its eps with norms of other features"

    def _name(self, factor: Factor) -> str:
        return " = ".join(map(repr, self.flow.names[factor.weight]))

    @cached_property
    def _sharing(self) -> dict[fx.Node, dict[Operation, Norm]]:
        """By weight: what reads it, and for which norm."""
        sharing: dict[fx.Node, dict[Operation, Norm]] = {}
        for norm in self.found.values():
            for factor in norm.factors:
                sharing.setdefault(factor.weight, {})[factor.reader] = norm
        return sharing

    @cached_property
    def _holders(self) -> dict[Operation, Holder]:
        """Found by effect: with another number in the attribute, the norm adds this number."""
        candidates: dict[Holder, list[Norm]] = {}
        for norm in self.found.values():
            if norm.adds is not None:
                for holder in _candidates(self.flow.model, norm):
                    candidates.setdefault(holder, []).append(norm)
        seen = _uses(self.flow.model, self.example_inputs, list(candidates))
        holders: dict[Operation, Holder] = {}
        for holder, norms in candidates.items():
            on_each_path = Counter(norm.operation.output.graph for norm in norms)
            if set(on_each_path.values()) == {seen.get(holder)}:
                holders |= {norm.operation: holder for norm in norms}
        return holders


# ---------------------------------------------------------------------------------- the pattern


def _norm_at(operation: Operation) -> Norm | str | None:
    """The norm whose mean it is; why it is none; None where it does not look like one."""
    if operation.target is aten.rms_norm.default:
        return _whole(operation)
    if operation.target is not aten.mean.dim:
        return None
    squares, dims = operation.args[0], operation.arg(1, "dim")
    if not isinstance(dims, list) or len(dims) != 1 or not _is_square(operation.flow, squares):
        return None
    place = squares, dims[0] % len(shape(squares))
    if count_of(place) is None:
        return None
    eps, adds, node = None, None, operation.output
    while (user := _only_user(operation.flow, node)) is not None:
        node = user.output
        number = _other_argument(user, user.sources[0])
        if user.target in _SUMS and adds is None and isinstance(number, float):
            eps, adds = number, user
        elif user.target is aten.rsqrt.default or _is_power(user, -0.5):
            return _finished(operation, place, node, eps, adds)
        elif user.target is aten.sqrt.default or _is_power(user, 0.5):
            return _finished(operation, place, node, eps, adds, divides=True)
        elif not _is_cast(user) and user.target is not aten.unsqueeze.default:
            break
    return None


def _whole(operation: Operation) -> Norm | str | None:
    """`torch.rms_norm`."""
    input, normalised = operation.args[:2]
    place = input, len(shape(input)) - 1
    if len(normalised) != 1 or count_of(place) is None:
        return "averages over several dims"
    weight, eps = operation.arg(2, "weight"), operation.arg(3, "eps")
    if weight is None:
        return _finished(operation, place, operation.output, eps, operation)
    if not operation.flow.names.get(weight):
        return "has no parameter as its weight"
    return Norm(operation, place, (Factor(weight, 0.0, operation),), eps, operation)


def _finished(
    operation: Operation,
    place: Place,
    node: fx.Node,
    eps: float | None,
    adds: Operation | None,
    divides: bool = False,
) -> Norm | str:
    factors = _takers(operation.flow, node, divides)
    if factors is None:
        return "has no weight of its own that could make up for fewer features"
    return Norm(operation, place, factors, eps, adds)


def _takers(flow: Dataflow, node: fx.Node, divides: bool) -> tuple[Factor, ...] | None:
    """The weights that together take in a factor of a value; None where that is not possible.

    Behind the value, everything must be proportional to it until a weight is reached.
    """
    factors: list[Factor] = []
    waiting, seen = [node], set[Operation]()
    while waiting:
        value = waiting.pop()
        if value in flow.returned:
            return None
        for user in flow.users[value]:
            if user in seen:
                return None  # it reads two values, both of which have the factor
            seen.add(user)
            taker = None if divides and value is node else _taker(user, value)
            if taker is not None:
                factors.append(taker)
            elif _is_proportional(user, value, divides and value is node):
                waiting.append(user.output)
            else:
                return None
    return tuple(factors) or None


def _taker(user: Operation, value: fx.Node) -> Factor | None:
    """A product with a weight."""
    if user.target is aten.linear.default and user.args[0] is value:
        return _factor(user, user.args[1])
    other = _other_argument(user, value)
    if user.target in _PRODUCTS and isinstance(other, fx.Node):
        return _factor(user, other)
    return None


def _factor(user: Operation, node: fx.Node) -> Factor | None:
    """A parameter or buffer, perhaps after a number was added to it."""
    flow, plus, reader = user.flow, 0.0, user
    while (operation := flow.operations.get(node)) is not None:
        number = _other_argument(operation, operation.sources[0]) if operation.sources else None
        if _only_user(flow, node) is None or not operation.sources:
            return None
        if operation.target in _SUMS and plus == 0.0 and isinstance(number, int | float):
            plus = float(number)
        elif not _is_cast(operation) and operation.target not in _MOVES:
            return None
        reader, node = operation, operation.sources[0]
    return Factor(node, plus, reader) if flow.names.get(node) else None


def _is_proportional(user: Operation, value: fx.Node, divides: bool) -> bool:
    """Whether a factor of the value is one of what is made of it; `divides`: its inverse is."""
    if divides:
        is_divisor = user.target in _QUOTIENTS and user.args[0] is not value
        return is_divisor or user.target is aten.reciprocal.default
    if user.target in _QUOTIENTS:
        return user.args[1] is not value
    if user.target in _PRODUCTS:
        return _other_argument(user, value) is not value
    moves = _is_cast(user) or user.target in _MOVES | {aten.neg.default, LAYER}
    return moves and user.args[0] is value


def _is_square(flow: Dataflow, node: fx.Node) -> bool:
    operation = flow.operations.get(node)
    while operation is not None and _is_cast(operation):
        operation = flow.operations.get(operation.args[0])
    if operation is None:
        return False
    if operation.target in _PRODUCTS:
        return operation.args[0] is operation.args[1]
    return operation.target is aten.square.default or _is_power(operation, 2)


def _is_cast(operation: Operation) -> bool:
    """It gives the same numbers, to rounding."""
    dtype: torch.dtype = operation.output.meta["val"].dtype
    return operation.target in _CASTS and (dtype.is_floating_point or dtype.is_complex)


def _is_power(operation: Operation, exponent: float) -> bool:
    return operation.target is aten.pow.Tensor_Scalar and operation.args[1] == exponent


def _other_argument(operation: Operation, value: fx.Node) -> Any:
    """Of two arguments the one that is not the value; the value, where both are."""
    if len(operation.args) != 2 or operation.kwargs.get("alpha", 1) != 1:
        return None
    return operation.args[1] if operation.args[0] is value else operation.args[0]


def _only_user(flow: Dataflow, node: fx.Node) -> Operation | None:
    users = flow.users[node]
    return users[0] if len(users) == 1 and node not in flow.returned else None


# -------------------------------------------------------------------------------- where eps stands


def _candidates(model: nn.Module, norm: Norm) -> Iterator[Holder]:
    """The attributes of its module that hold the same number, or None for torch's."""
    assert norm.adds is not None
    name = module_of(norm.adds)
    for attribute, value in vars(model.get_submodule(name)).items():
        is_number = isinstance(value, float) and value == norm.eps
        is_none = value is None and norm.eps is None and "eps" in attribute
        if is_number or is_none:
            yield Holder(name, attribute)


def _uses(model: nn.Module, inputs: Inputs, holders: list[Holder]) -> dict[Holder, int]:
    """How many calls read each of them, found in one run with a number of its own in each.

    Every other number must be as in a run without: none is computed from them.
    """
    if not holders:
        return {}
    before = [getattr(model.get_submodule(h.module), h.attribute) for h in holders]
    marks = [
        (1e-5 if value is None else value) * (1 + (i + 1) * 2.0**-30)
        for i, value in enumerate(before)
    ]
    try:
        plain = _numbers(model, inputs, [])
        marked = _numbers(model, inputs, list(zip(holders, marks, strict=True)))
    except Exception:  # a model that does not run with other numbers
        return {}
    of_mark = dict(zip(marks, holders, strict=True))
    uses: dict[Holder, int] = {}
    if len(plain) != len(marked):
        return {}
    for number, mark in zip(plain, marked, strict=True):
        if number == mark:
            continue
        holder = of_mark.get(mark) if mark is not None else None
        if holder is None:
            return {}
        uses[holder] = uses.get(holder, 0) + 1
    return uses


def _numbers(
    model: nn.Module, inputs: Inputs, marks: list[tuple[Holder, float]]
) -> list[float | None]:
    def seen(probe: nn.Module, probe_inputs: Inputs) -> list[float | None]:
        for holder, mark in marks:
            setattr(probe.get_submodule(holder.module), holder.attribute, mark)
        numbers = _Numbers()
        with numbers:
            call(probe, probe_inputs)
        return numbers.seen

    return without_numbers(model, inputs, seen)


class _Numbers(TorchFunctionMode):
    """All numbers that torch's functions are called with, and where none is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        self.seen += [x for x in leaves if x is None or isinstance(x, float)]
        return func(*args, **kwargs)
