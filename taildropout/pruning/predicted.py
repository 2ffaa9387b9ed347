"""Whether the small network's own dataflow is the one that was predicted.

The model's code may read a width as a number, as in `h / h.shape[-1]`, or hold one that is written
in it, as a number of heads. The dataflow of the large network does not show it. That of the small
one does: each operation must be the one of the large network, on the same values, with the same
numbers, and its result of the shape that is left.
"""

import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ..graph.dataflow import Dataflow
from ..graph.exports import LAYER, Export, export, is_tensor, shape, size_of, traceable
from ..graph.rules import RULES, is_known
from ..models.copies import PruningError, structural_copy
from ..models.names import name_in
from .cuts import Findings, Reading
from .surgery import operate
from .verify import does_not_run

# Of larger networks the small one is read with fixed sizes, which takes a third of the time.
MOST_WITH_SYMBOLS = 150


def cut_unread(
    model: nn.Module, ks: dict[str, int], reading: Reading, outputs: bool = False
) -> tuple[Findings, nn.Module]:
    """What goes by what is known of the model so far, and the small network."""
    found = reading.find(ks, reading.whole, outputs=outputs)
    small = structural_copy(model)
    operate(small, found.cuts, found.folds, found.fits, found.rescales, found.to_linears)
    return found, small


def cut_as_predicted(
    model: nn.Module, ks: dict[str, int], reading: Reading, outputs: bool = False
) -> tuple[Findings, nn.Module]:
    """What goes, and the small network, whose dataflow is the one that was predicted.

    Where it is not, what its operations read stays.

    Raises:
        PruningError: the small network does not run, though nothing goes from it.
    """
    layers = {operation.output for operation in reading.flow.calls()}
    with_sizes = _with_sizes(reading.flow)
    reading.whole = set()
    while True:
        found, small = cut_unread(model, ks, reading, outputs)
        if not (found.cuts or found.fits):  # it is the large one
            return found, small
        try:
            differ = _unlike_predicted(reading.flow, found, small)
        except PruningError:
            if layers <= reading.whole:
                raise
            differ = with_sizes - reading.whole or layers
        if not differ:
            return found, small
        if any(node.op == "output" for node in differ):
            differ |= layers
        if layers <= reading.whole:
            raise PruningError(
                "the model must take the same steps each time that it is exported, but "
                f"{', '.join(map(str, differ))} did not"
            )
        reading.whole |= layers if differ <= reading.whole else differ


def _unlike_predicted(flow: Dataflow, found: Findings, small: nn.Module) -> set[fx.Node]:
    """The values that operations of the small network compute otherwise; empty if none does.

    What is returned may be among them, where the difference belongs to no operation.

    Raises:
        PruningError: the small network can't be read.
    """
    traced = traceable(small)
    differ: set[fx.Node] = set()
    for path in flow.paths.exports:
        # Torch does not export quite the same without symbols: a difference is looked at again.
        fixed = [set[int]() for _ in path.symbols]
        few = len(path.nodes) <= MOST_WITH_SYMBOLS and path is flow.paths.exports[0]
        ways = [path.symbols] if few else [fixed, path.symbols]
        node = None
        for symbols in ways:
            node = _first_difference(flow, path, _export(traced, path, symbols), found)
            if node is None:
                break
        if node is not None:
            differ |= _of_the_same_line(path, node)
    return differ


def _export(traced: nn.Module, path: Export, symbols: list[set[int]]) -> Export:
    try:
        return export(traced, path.inputs, symbols, is_known)
    except Exception as error:
        raise does_not_run(error) from error


def _first_difference(flow: Dataflow, path: Export, own: Export, found: Findings) -> fx.Node | None:
    node = _SideBySide(flow, path, own, found).first_difference()
    return path.nodes[-1] if node is None and not _compares_like(path, own) else node


def _with_sizes(flow: Dataflow) -> set[fx.Node]:
    """What operations compute among whose arguments sizes stand."""
    nodes = {node for path in flow.paths.exports for node in path.nodes if _has_sizes(node)}
    return _with_results(nodes)


def _has_sizes(node: fx.Node) -> bool:
    rule = RULES.get(node.target)
    return rule is not None and rule.has_sizes


def _of_the_same_line(path: Export, node: fx.Node) -> set[fx.Node]:
    """What the operation computes, and what it computes in other blocks of the same class."""
    line = node.meta.get("stack_trace")
    alike = {
        other
        for other in path.nodes
        if other is node
        or (line and other.target == node.target and other.meta.get("stack_trace") == line)
    }
    return _with_results(alike)


def _with_results(nodes: set[fx.Node]) -> set[fx.Node]:
    """Of an operation with several results, these too."""
    return nodes | {user for node in nodes if not is_tensor(node) for user in node.users}


def _compares_like(path: Export, own: Export) -> bool:
    """Whether sizes are compared with the same numbers, so that the paths part at the same sizes."""
    if not any(own.symbols):
        return True
    relations, own_relations = (
        {str(c.relation) for c in e.comparisons if not c.of_torch} for e in (path, own)
    )
    return own_relations <= relations


class _SideBySide:
    """Two exports, operation by operation."""

    def __init__(self, flow: Dataflow, large: Export, small: Export, found: Findings) -> None:
        self.flow, self.found = flow, found
        self.large, self.small = large, small
        new_biases = {fold.name for fold in found.folds}
        new_biases |= {name_in(to_linear.name, "bias") for to_linear in found.to_linears}
        fitted = {fit.layer for fit in found.fits}
        to_linears = {to_linear.name for to_linear in found.to_linears}
        self.dissolved = {
            layer
            for name, layer in flow.tail_linears.items()
            if name in to_linears and layer not in fitted
        }
        self.new_biases = {node for node, name, _ in _given(small) if name in new_biases}
        self.twin: dict[fx.Node, fx.Node] = {}  # of each value of the small network

    def first_difference(self) -> fx.Node | None:
        """A node of the large network: an operation, or what is returned."""
        given = {name: (node, constant) for node, name, constant in _given(self.large)}
        for own, name, own_constant in _given(self.small):
            node, constant = given.get(name, (None, None))
            if node is not None and (constant is None or _equal(constant, own_constant)):
                self.twin[own] = node
        # Where one has more operations, what it returns in the end meets one of them.
        operations, own_operations = self._operations(self.large), self._operations(self.small)
        for node, own in zip(operations, own_operations, strict=False):
            if not self._alike(node, own):
                return node
            self.twin[own] = node
        return None

    def _alike(self, node: fx.Node, own: fx.Node) -> bool:
        if node.target != own.target:
            return False
        return all(self._same(node, arg, own_arg) for arg, own_arg in _pairs(node, own)) and (
            node.op == "output" or self._has_predicted_shape(node, own)
        )

    def _same(self, node: fx.Node, arg: Any, own: Any) -> bool:
        """Whether an argument of the operation is the same."""
        if own in self.new_biases and arg is None:
            return True
        if isinstance(own, fx.Node) and _number(own) is own:
            return isinstance(arg, fx.Node) and self.twin.get(
                self._unsliced(own)
            ) is self._unsliced(arg)
        number, own_number = _number(arg), _number(own)
        norm = self.found.of_norms.get(node)
        sizes_differ = node.target is LAYER or _has_sizes(node) or norm is not None
        if sizes_differ and isinstance(number, int) and isinstance(own_number, int):
            return True
        if norm is not None and isinstance(own_number, float):
            before, after = norm
            return number is None or own_number == number * before / after
        return type(number) is type(own_number) and bool(number == own_number)

    def _has_predicted_shape(self, node: fx.Node, own: fx.Node) -> bool:
        """Whether the result has the shape that is left where features have gone."""
        shapes, own_shapes = _shapes(node), _shapes(own)
        if len(shapes) > 1:  # each of the results is picked by an operation of its own
            return len(shapes) == len(own_shapes)
        for dim in range(len(shapes[0])):
            stays = self.found.solution.stays.get((self.flow.same.get(node, node), dim))
            if stays is not None and len(stays) > 0:
                shapes[0][dim] = int((stays > 0).sum())
        return shapes == own_shapes

    def _operations(self, export: Export) -> list[fx.Node]:
        """What computes tensors, and what is returned.

        With symbols, slices of all stand in between.
        """
        return [
            node
            for node in export.nodes
            if node.op == "output"
            or (node.op == "call_function" and _shapes(node) and self._unsliced(node) is node)
        ]

    def _unsliced(self, node: fx.Node) -> fx.Node:
        """What a slice is of, where it takes all, what has an alias or is made contiguous, and what
        a layer passes on that is there no more.
        """
        while (
            _takes_all(node)
            or node.target in (torch.ops.aten.alias.default, torch.ops.aten.contiguous.default)
            or (node.target is LAYER and node.args[1] in self.dissolved)
        ):
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        return node


def _given(export: Export) -> Iterator[tuple[fx.Node, str, Any]]:
    """Parameters, buffers, constants and inputs, with their names; and the values of constants."""
    nodes = (node for node in export.nodes if node.op == "placeholder")
    for node, spec in zip(nodes, export.program.graph_signature.input_specs, strict=True):
        constant = (
            export.program.constants.get(spec.target)
            if spec.kind == InputKind.CONSTANT_TENSOR
            else None
        )
        yield node, spec.target or node.name, constant


def _equal(constant: Any, own: Any) -> bool:
    return constant is own or (
        isinstance(constant, Tensor) and isinstance(own, Tensor) and torch.equal(constant, own)
    )


def _takes_all(node: fx.Node) -> bool:
    """Whether it is a slice of all there is, at all sizes."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    source, dim, *bounds = _in_full(node).values()
    return bounds == [0, sys.maxsize, 1] or (
        bounds[0] == 0
        and isinstance(bounds[1], fx.Node)
        and bounds[2] == 1
        and size_of(bounds[1].meta["val"]) == shape(source)[dim]
    )


def _pairs(node: fx.Node, own: fx.Node) -> Iterator[tuple[Any, Any]]:
    """What their arguments hold, one by one. One number may stand for several of the same."""
    for held, own_held in zip_longest(_arguments(node), _arguments(own)):
        one, other = held or [], own_held or []
        count = max(len(one), len(other))
        yield from zip_longest(
            one * count if len(one) == 1 else one, other * count if len(other) == 1 else other
        )


def _arguments(node: fx.Node) -> list[list[Any]]:
    """What each argument holds; torch leaves out those that have their default.

    But the number of groups of a convolution, which the shapes of its input and weight tell.
    """
    if getattr(node.target, "_schema", None) is None:
        return [_held(argument) for argument in (*node.args, node.kwargs)]
    return [_held(value) for name, value in _in_full(node).items() if name != "groups"]


def _in_full(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operation by name."""
    values = {
        argument.name: (
            node.args[i]
            if i < len(node.args)
            else node.kwargs.get(argument.name, argument.default_value)
        )
        for i, argument in enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    }
    if node.target is torch.ops.aten.slice.Tensor:
        for bound, meant in (("start", 0), ("end", sys.maxsize)):
            values[bound] = meant if values[bound] is None else values[bound]
    return values


def _held(argument: Any) -> list[Any]:
    return tree_leaves(argument, is_leaf=lambda value: value is None)


def _number(argument: Any) -> Any:
    """Of a size that is a symbol, what it is in the example."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    is_number = isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
    return _in_example(value) if is_number else argument


def _in_example(size: Any) -> Any:
    return (
        size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
    )


def _shapes(node: fx.Node) -> list[list[int]]:
    """Of each result."""
    results = tree_leaves(node.meta.get("val"))
    return [[_in_example(n) for n in v.shape] for v in results if isinstance(v, Tensor)]
