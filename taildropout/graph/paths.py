"""All paths that the model's code takes, whatever the sizes of its inputs.

Code that compares sizes takes one of several paths, and torch follows the path of the example. So
what it compared is turned around: the model is read at sizes, too, where a comparison comes out
otherwise, and at the neighbours of sizes that it uses as numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
from torch import nn
from torch.overrides import TorchFunctionMode

from ..models.copies import PruningError, first_line, with_own_buffers
from ..models.fakes import on_fakes
from ..models.inputs import Inputs, as_arguments, call, leaving_no_trace, tensors_of
from .exports import (
    LAYER,
    Compared,
    Comparison,
    Export,
    Knows,
    Tied,
    export,
    of_shapes,
    shape,
    traceable,
)

# As many paths are read, at most.
MOST_PATHS = 6


@dataclass(frozen=True)
class Paths:
    """The model, read on each path that its sizes lead to.

    Attributes:
        exports: that of the example first.
        unread: sizes at which the model was not read, in the user's words.
    """

    exports: list[Export]
    unread: list[str]

    def other_inputs(self) -> list[tuple[str, Inputs]]:
        """Inputs of other sizes, with what they are: one more of everything, or one of it."""
        first, *others = self.exports
        found = [(f"sizes that lead to path {i + 2}", e.inputs) for i, e in enumerate(others)]
        own = first.values_at(first.inputs)
        if own:
            larger = {symbol: value + 1 for symbol, value in own.items()}
            found.insert(0, ("larger sizes", first.resized(larger)))
            found.insert(1, ("sizes of one", first.resized(dict.fromkeys(own, 1))))
        return found


@dataclass(frozen=True)
class _Turn:
    """Sizes at which the model may take another path.

    `alone`: a path of these sizes and no others. `far`: only if other functions are called there, or
    layers get other numbers of features. `instead` are tried where the model does not run.
    """

    words: str
    inputs: Inputs
    alone: bool = False
    instead: "_Turns" = tuple
    far: bool = False


_Turns = Callable[[], Iterable[_Turn]]  # made only where they are needed: inputs may be large


def read_paths(
    model: nn.Module, example_inputs: Inputs, knows: Knows, most: int = MOST_PATHS
) -> Paths:
    """Raises PruningError where the model can't be exported, or holds no numbers."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PruningError(
            "the model's parameters must hold numbers, and some are on the meta device: load its "
            "weights first"
        )
    tensors = tensors_of(as_arguments(example_inputs))
    if any(x.ndim > 0 and len(x) == 0 for x in tensors[:1]):
        raise PruningError("the example inputs must hold at least one sample")
    traced = traceable(model)
    first, compared = _export_of_example(traced, example_inputs, knows)
    usual = cache(lambda: _functions_called(traced, example_inputs))
    exports, unread = [first], []
    turns = [*_neighbours(first), *_turns(first), *_turns_of_numbers(first, compared)]
    waiting = turns if most > 1 else []
    while waiting:
        turn = waiting.pop(0)
        if any(known.covers(turn.inputs) for known in exports):
            continue
        called = _functions_called(traced, turn.inputs)
        if called is None:
            waiting += turn.instead()
            continue
        if turn.far and _looks_alike(called, usual() or called):
            continue
        if len(exports) == most:
            unread.append(f"{turn.words}, on more than {most} paths")
            continue
        symbols = [set() for _ in first.symbols] if turn.alone else first.symbols
        try:
            other = export(traced, turn.inputs, symbols, knows)
        except Exception as error:
            unread.append(f"{turn.words}, where exporting fails: {first_line(error)}")
            continue
        exports.append(other)
        if not turn.alone:
            waiting += _turns(other)
    return Paths(exports, [*unread, *_beyond_numbers(exports)])


def _export_of_example(
    traced: nn.Module, example_inputs: Inputs, knows: Knows
) -> tuple[Export, list[Compared]]:
    """And what its code compared, also of sizes that are numbers in it."""
    symbols = [set(range(x.ndim)) for x in tensors_of(as_arguments(example_inputs))]
    compared: list[Compared] = []
    try:
        with suppress(Exception):  # the sizes of some models can't be symbols
            found = _export_untied(traced, example_inputs, symbols, knows, compared)
            return found, compared + found.compared
        return export(traced, example_inputs, [set() for _ in symbols], knows), compared
    except Exception as error:
        _check_that_it_runs(traced, example_inputs)
        raise PruningError(
            "the model must be exportable by torch.export, which reads its dataflow, but "
            f"exporting it failed: {first_line(error)}"
        ) from error


def _check_that_it_runs(traced: nn.Module, inputs: Inputs) -> None:
    """An export that fails speaks of symbols; a plain call of the sizes that there are."""
    model = with_own_buffers(traced)
    try:
        with leaving_no_trace(model, inputs) as own_inputs:
            call(model, own_inputs)
    except Exception as error:
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(as_arguments(inputs)))
        raise PruningError(
            f"the model must run on its example inputs, but with those of {sizes} it raised "
            f"{first_line(error)}: pass inputs as the model takes them, a tensor, a tuple or a dict"
        ) from error


def _export_untied(
    traced: nn.Module,
    inputs: Inputs,
    symbols: list[set[int]],
    knows: Knows,
    compared: list[Compared],
) -> Export:
    """With symbols for as many of these sizes as need not come to a number.

    What was compared before that was found out is added to `compared`.
    """
    try:
        return export(traced, inputs, symbols, knows, untied=True)
    except Tied as tied:
        fewer = [free - fixed for free, fixed in zip(symbols, tied.dims, strict=True)]
        compared += tied.compared
    return _export_untied(traced, inputs, fewer, knows, compared)


def _looks_alike(called: list[str], usual: list[str]) -> bool:
    """Whether the same is called, or the same again and again, as at a larger size."""
    return called == usual or (len(called) > len(usual) and set(called) == set(usual))


def _functions_called(traced: nn.Module, inputs: Inputs) -> list[str] | None:
    """The names of torch's functions in turn, and how many features layers have.

    None where the model does not take inputs of such sizes.
    """
    names = _Names()
    try:
        with on_fakes(traced, inputs) as (fake, fake_inputs), names:
            call(fake, fake_inputs)
    except Exception:  # whatever it raises: it does not
        return None
    return names.seen


class _Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(getattr(func, "__name__", func)))
        if func is LAYER:
            self.seen.append(f"{args[1:]}")
        return func(*args, **(kwargs or {}))


def _turns(export: Export) -> Iterator[_Turn]:
    """The nearest sizes at which comparisons in the model's code come out otherwise.

    Many set sizes of one apart. These are read once, at the size of one in all places.
    """
    own = export.values_at(export.inputs)
    assert own is not None
    ones: dict[sympy.Symbol, int] = {}
    for comparison in export.comparisons:
        relation = comparison.relation
        for symbol in () if comparison.of_torch else sorted(relation.free_symbols, key=str):
            for value in _candidates(relation, own[symbol]):
                values = {**own, symbol: value}
                if comparison.holds_at(values) is False:
                    if _sets_one_apart(relation):
                        ones[symbol] = value
                    else:
                        words = f"sizes other than {_in_words(export, relation)}"
                        yield _Turn(words, export.resized(values))
                    break
    if ones:

        def one_by_one() -> Iterator[_Turn]:
            for symbol, value in ones.items():
                yield _Turn("sizes of one", export.resized({**own, symbol: value}), alone=True)

        yield _Turn("sizes of one", export.resized({**own, **ones}), True, one_by_one)


def _turns_of_numbers(first: Export, compared: list[Compared]) -> Iterator[_Turn]:
    """The same of comparisons of sizes that turned out to be numbers later in the model's code."""
    for relation, own in compared:
        sizes = {symbol: size for symbol, (_, size) in own.items()}
        for symbol, (dim, size) in own.items():
            if (dim, size) not in first.numbers:
                continue
            for other in _candidates(relation, size):
                if Comparison(relation, False).holds_at({**sizes, symbol: other}) is False:
                    yield _turn_of_number(first, dim, size, other)
                    break


def _sets_one_apart(relation: Any) -> bool:
    """Whether it holds of all sizes or products of them but 1, as `x > 1` and `6 * x != 6` do."""
    x = sympy.Dummy(integer=True, positive=True)
    sides = []
    for side in relation.args:
        factor, rest = side.as_coeff_Mul() if isinstance(side, sympy.Expr) else (1, side)
        if not all(part.is_symbol for part in sympy.Mul.make_args(rest) if part != 1):
            return False
        sides.append(side if side.is_number else factor * x)
    if len(sides) != 2 or not any(side.is_number for side in sides):
        return False
    of_x = relation.func(*sides)
    return [of_x.subs(x, n) for n in (1, 2, 3)] == [sympy.false, sympy.true, sympy.true]


def _candidates(relation: sympy.Basic, own: int) -> list[int]:
    """Sizes to try: those around, and those around the numbers that are compared with."""
    numbers = {abs(int(number)) for number in relation.atoms(sympy.Integer)}
    tried = {*range(1, 2 * own + 17), *(n + d for n in numbers for d in (-1, 0, 1) if n + d > 0)}
    return sorted(tried, key=lambda value: (abs(value - own), value))


def _neighbours(export: Export) -> Iterator[_Turn]:
    """The neighbours of sizes that the model's code uses as numbers, and some further away."""
    for dim, size in export.numbers:
        for other in dict.fromkeys((size - 1, size + 1, 1, 2, 4 * size + 1)):
            if other not in (0, size):
                yield _turn_of_number(export, dim, size, other, far=abs(other - size) > 1)


def _turn_of_number(export: Export, dim: int, size: int, other: int, far: bool = False) -> _Turn:
    """Inputs in which a dim of this size has another one.

    If need be all else is of size one, or all dims of this size have the other one.
    """
    before = [tensor.shape for tensor in tensors_of(as_arguments(export.inputs))]

    def turn(inputs: Any, every_dim: bool = False, instead: _Turns = tuple) -> _Turn:
        shapes = [
            [
                other if n == size and (every_dim or d == dim) else now
                for d, (n, now) in enumerate(zip(sizes, tensor.shape, strict=True))
            ]
            for sizes, tensor in zip(before, tensors_of(as_arguments(inputs)), strict=True)
        ]
        words = f"size {other} instead of {size} in dim {dim}"
        return _Turn(words, of_shapes(inputs, shapes), alone=True, instead=instead, far=far)

    def instead() -> Iterator[_Turn]:
        own = export.values_at(export.inputs) or {}
        yield turn(export.resized(dict.fromkeys(own, 1)))
        yield turn(export.inputs, every_dim=True)

    return turn(export.inputs, instead=instead)


def _beyond_numbers(exports: list[Export]) -> Iterator[str]:
    """The sizes that are used as numbers, of which only the neighbours were read."""
    first, *others = exports
    for dim, size in first.numbers:
        read = {
            tensor.shape[dim]
            for other in others
            for tensor in tensors_of(as_arguments(other.inputs))
            if tensor.ndim > dim and abs(tensor.shape[dim] - size) == 1
        }
        if read:
            sizes = ", ".join(map(str, sorted(read | {size})))
            yield f"sizes other than {sizes} in dim {dim}, which the model's code uses as numbers"


def _in_words(export: Export, relation: sympy.Basic) -> str:
    """A comparison of sizes, with what stands for each of them."""
    names: dict[sympy.Symbol, str] = {}
    for node in export.placeholders:
        for dim, size in enumerate(shape(node)):
            if isinstance(size, sympy.Symbol):
                names.setdefault(size, f"{node.name}.shape[{dim}]")
    return str(relation.subs({symbol: sympy.Symbol(name) for symbol, name in names.items()}))
