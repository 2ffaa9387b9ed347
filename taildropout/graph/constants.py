"""What operations make of features that are constant.

Behind a layer the tail is zero, behind a sigmoid it is 0.5. What is known of a place is which of
its features have one value in every sample, at every position and at every size, and this value:
vectors of n numbers, never activations. Of an operation without a transfer nothing is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from .dataflow import Operation, count_of, layer_dim
from .exports import is_tensor, shape
from .relations import Place


@dataclass(frozen=True)
class Known:
    """The features of `mask` have these values. Elsewhere `value` is 0."""

    mask: Tensor  # bool, (n,)
    value: Tensor  # float64, (n,)

    @classmethod
    def of(cls, mask: Tensor, value: Tensor) -> "Known":
        mask = mask & value.isfinite()
        return cls(mask, value.masked_fill(~mask, 0))

    @classmethod
    def nothing(cls, n: int) -> "Known":
        return cls(torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.float64))

    @property
    def zero(self) -> Tensor:
        """The features that are zero."""
        return self.mask & (self.value == 0)

    def passed(self, labels: Tensor, there: Tensor) -> "Known":
        """Of features with labels `there`: all those here that have the label are of one value."""
        size = max((1 + int(some.max()) for some in (labels, there) if len(some)), default=0)
        here = labels + 1  # 0: belongs to nothing
        low = torch.full((1 + size,), torch.inf, dtype=torch.float64)
        high = -low
        value = self.value.masked_fill(~self.mask, torch.nan)
        low.scatter_reduce_(0, here, value, "amin")  # NaN where one is unknown
        high.scatter_reduce_(0, here, value, "amax")
        mask = (low == high)[there + 1] & (there >= 0)
        return Known.of(mask, low[there + 1].masked_fill(~mask, 0))


class Facts(Protocol):
    """What is known in front of an operation."""

    def at(self, place: Place) -> Known: ...

    def uniform(self, value: fx.Node) -> float | None:
        """The number that all entries of a value are, if that is known."""
        ...

    def passes(self, operation: Operation, dim: int) -> list[tuple[Place, Tensor, Tensor]]:
        """The places that a dim of its output is related to, and the labels here and there."""
        ...


Transfer = Callable[[Operation, int, Facts], Known | None]
"""What is known along a dim of the operation's output; None: nothing."""


def from_related(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """Each feature is what it is where it comes from, and the same wherever it comes from."""
    found: dict[fx.Node, tuple[Tensor, Known]] = {}
    for place, labels, there in facts.passes(operation, dim):
        passed = facts.at(place).passed(labels, there)
        comes, before = found.get(place[0], (torch.zeros(len(there), dtype=torch.bool), None))
        if before is not None:  # positions and channels: one of them is enough
            passed = Known(
                passed.mask | before.mask, torch.where(passed.mask, passed.value, before.value)
            )
        found[place[0]] = comes | (there >= 0), passed
    known: Known | None = None
    taken = torch.zeros(0, dtype=torch.bool)
    for comes, passed in found.values():
        if known is None:
            known, taken = passed, comes
            continue
        agrees = passed.mask & (passed.value == known.value) & known.mask
        mask = torch.where(comes & taken, agrees, torch.where(comes, passed.mask, known.mask))
        known = Known.of(mask, torch.where(taken, known.value, passed.value))
        taken = taken | comes
    return known


def zeros_from_related(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """Sums of zeros."""
    known = from_related(operation, dim, facts)
    return None if known is None else Known(known.zero, torch.zeros_like(known.value))


def zeros_from_any(*factors: int) -> Transfer:
    """Products, summed: zeros in one of these arguments are enough."""

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        nodes = [operation.args[i] for i in factors]
        return _zeros_from(nodes, operation, dim, facts)

    return transfer


def zeros_from_any_factor(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """An einsum."""
    return _zeros_from(operation.args[1], operation, dim, facts)


def _zeros_from(
    factors: list[fx.Node], operation: Operation, dim: int, facts: Facts
) -> Known | None:
    zero: Tensor | None = None
    for place, labels, there in facts.passes(operation, dim):
        if place[0] in factors:
            found = facts.at(place).passed(labels, there).zero
            zero = found if zero is None else zero | found
    return None if zero is None else Known(zero, torch.zeros(len(zero), dtype=torch.float64))


def padded(value_at: int) -> Transfer:
    """What is filled in along other dims must be of the same value."""

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        known = from_related(operation, dim, facts)
        amounts = operation.arg(1, "pad")
        i = 2 * (len(shape(operation.output)) - 1 - dim)
        others = [*amounts[:i], *amounts[i + 2 :]]
        if known is None or all(amount == 0 for amount in others):
            return known
        filled = operation.arg(value_at, "value", 0) or 0
        return Known.of(known.mask & (known.value == filled), known.value)

    return transfer


def by_evaluation(*zeroed_by: int) -> Transfer:
    """Elementwise functions, on one number for each feature.

    `zeroed_by` are the arguments whose zeros make zeros, whatever finite the others are.
    """

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        n = count_of((operation.output, dim))
        assert n is not None
        seen = {source: _aligned(source, operation, dim, n, facts) for source in operation.sources}
        known = _evaluated(operation, dim, n, seen)
        unknown = ~torch.stack([torch.ones(n, dtype=torch.bool), *(s.mask for s in seen.values())])
        for i in zeroed_by:
            factor = operation.args[i]
            if factor in seen:
                zero = seen[factor].zero & unknown.any(0)  # where all are known, it was evaluated
                known = Known(known.mask | zero, known.value.masked_fill(zero, 0))
        return known

    return transfer


def by_choice(*choices: int) -> Transfer:
    """where, masked_fill: if all that can be chosen is one value, so is what was chosen."""

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        known = by_evaluation()(operation, dim, facts)
        n = count_of((operation.output, dim))
        assert n is not None
        chosen: Known | None = None
        for i in choices:
            choice = operation.args[i]
            if isinstance(choice, fx.Node):
                if not is_tensor(choice):
                    return known
                option = _aligned(choice, operation, dim, n, facts)
            else:
                option = _all(float(choice), n)
            if chosen is None:
                chosen = option
            else:
                both = chosen.mask & option.mask & (chosen.value == option.value)
                chosen = Known.of(both, chosen.value)
        assert known is not None
        assert chosen is not None
        return Known(known.mask | chosen.mask, torch.where(known.mask, known.value, chosen.value))

    return transfer


def _all(value: float, n: int) -> Known:
    return Known.of(torch.ones(n, dtype=torch.bool), torch.full((n,), value, dtype=torch.float64))


def _aligned(source: fx.Node, operation: Operation, dim: int, n: int, facts: Facts) -> Known:
    """A source's features where they meet those of the output."""
    own = dim - (len(shape(operation.output)) - len(shape(source)))
    if own >= 0 and shape(source)[own] == n:
        return facts.at((source, own))
    value = facts.uniform(source)
    return Known.nothing(n) if value is None else _all(value, n)


def _evaluated(operation: Operation, dim: int, n: int, seen: dict[fx.Node, Known]) -> Known:
    if operation.reads_sizes:
        return Known.nothing(n)
    along = [n if d == dim else 1 for d in range(len(shape(operation.output)))]
    values = {source: _as_type(known.value.view(along), source) for source, known in seen.items()}
    try:
        result = operation.run(values).to("cpu", torch.float64).reshape(-1)
    except (RuntimeError, TypeError):  # it can't be run in float64
        return Known.nothing(n)
    mask = torch.ones(n, dtype=torch.bool)
    for known in seen.values():
        mask = mask & known.mask
    return Known.of(mask, result) if len(result) == n else Known.nothing(n)


def _as_type(value: Tensor, source: fx.Node) -> Tensor:
    dtype = source.meta["val"].dtype
    return value if dtype.is_floating_point else value.to(dtype)


def of_layer(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """Along other dims than its own zeros only are what they were, if it puts zeros between."""
    own = layer_dim(operation)
    kept = [there >= 0 for _, _, there in facts.passes(operation, own)]
    puts_zeros = not kept or not all(some.all() for some in kept)
    along_others = dim != own and puts_zeros
    return (zeros_from_related if along_others else from_related)(operation, dim, facts)


def of_channels(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """Batch normalisation by running statistics, PReLU: one number for each channel, in dim 1."""
    if dim != 1:
        return None
    input, *parameters = operation.sources
    known = facts.at((input, 1))
    values = {input: known.value[None]}  # (1, n)
    for parameter in parameters:
        if not operation.flow.is_constant(parameter):
            return None
        values[parameter] = operation.flow.constant(parameter)
    try:
        return Known.of(known.mask, operation.run(values).double().flatten())
    except (RuntimeError, TypeError):
        return None


def of_halves(operation: Operation, dim: int, facts: Facts) -> Known | None:
    """glu: the first half, times the sigmoid of the second."""
    input = operation.args[0]
    rank = len(shape(input))
    if dim != operation.arg(1, "dim", -1) % rank:  # both halves are of this value
        both = from_related(operation, dim, facts)
        return None if both is None else Known.of(both.mask, both.value * both.value.sigmoid())
    known = facts.at((input, dim))
    half = len(known.mask) // 2
    value = known.value[:half] * known.value[half:].sigmoid()
    mask = known.mask[:half] & known.mask[half:]
    found, zero = Known.of(mask, value), known.zero[:half]
    return Known(found.mask | zero, found.value.masked_fill(zero, 0))


def all_of(number: float) -> Transfer:
    """Tensors that are made of one number."""

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        n = count_of((operation.output, dim))
        return None if n is None else _all(number, n)

    return transfer


def all_of_argument(position: int) -> Transfer:
    """The number stands among the arguments."""

    def transfer(operation: Operation, dim: int, facts: Facts) -> Known | None:
        number, dtype = operation.args[position], operation.output.meta["val"].dtype
        if not isinstance(number, int | float):
            return None
        alike = operation.sources and operation.kwargs.get("dtype") is None
        if not (alike and dtype.is_floating_point):  # rounded, whatever the dtype of the model
            number = torch.tensor(number, dtype=dtype).item()
        return all_of(number)(operation, dim, facts)

    return transfer
