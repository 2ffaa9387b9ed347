"""The dataflow of a model: values, and the operations between them.

It is read once, on all paths that the model's code takes at some sizes, and solved for any k.
Parameters are the same values on all of them.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ..layers import TailLinear
from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, tensors_by_name
from ..models.inputs import Inputs
from ..models.insert import tail_dropouts
from .exports import LAYER, Export, Knows, Size, is_tensor, shape
from .paths import MOST_PATHS, read_paths


@dataclass(frozen=True, eq=False)
class Operation:
    """What computes one value. Of an operation with several results, `pick` is the one."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pick: int | None
    output: fx.Node
    sources: tuple[fx.Node, ...]  # the values that it reads
    flow: "Dataflow"

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument, given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def run(self, values: Mapping[fx.Node, Tensor]) -> Tensor:
        """The result for other values.

        Raises:
            KeyError: a value is missing; the sizes that stand among the arguments always are.
        """
        args, kwargs = fx.node.map_arg((self.args, self.kwargs), lambda node: values[node])
        result = self.target(*args, **kwargs)
        picked: Tensor = result if self.pick is None else result[self.pick]
        return picked

    @property
    def reads_sizes(self) -> bool:
        """Whether sizes that are symbols stand among its arguments."""
        found: list[fx.Node] = []
        fx.node.map_arg((self.args, self.kwargs), found.append)
        return any(not is_tensor(node) for node in found)


class Dataflow:
    """The model's dataflow in eval mode, in which each TailDropout is one operation.

    Attributes:
        values: all tensors, parameters and buffers first, then in the order of computation. A
            tied parameter is one value.
        operations: what computes a value; parameters, buffers and inputs have none.
        users: the operations that read a value.
        returned: values that the model returns.
        outputs: all that the model returns on each path, in order; None for what is no tensor.
        names: of parameters and buffers; tied ones have several.
        same: the value that stands for a node, where several are one tensor.
        layers: the model's TailDropouts by name.
        tail_linears: the model's TailLinears by name, and the names of their TailDropouts.
        n: the number of features of each layer that the model calls with one number of them.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        knows: Knows = lambda target: True,
        most_paths: int = MOST_PATHS,
    ) -> None:
        self.model = model
        self.layers = tail_dropouts(model)
        names = {layer: name for name, layer in self.layers.items()}
        self.tail_linears = {
            name: names[module.dropout]
            for name, module in model.named_modules()
            if isinstance(module, TailLinear)
        }
        self.paths = read_paths(model, example_inputs, knows, most_paths)
        self.operations: dict[fx.Node, Operation] = {}
        self.values: list[fx.Node] = []
        self.returned: set[fx.Node] = set()
        self.outputs: list[list[fx.Node | None]] = []
        self.names: dict[fx.Node, list[str]] = {}
        self._tensors: dict[fx.Node, Tensor] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        for export in self.paths.exports:
            self.same |= self._find_tensors(export)
        for export in self.paths.exports:
            for node in export.nodes:
                if node.op == "output":
                    self.returned |= set(_values_in(node.args, self.same))
                    self.outputs.append(self._outputs(export, node))
                elif is_tensor(node) and self.same.get(node, node) is node and _is_used(node):
                    self.values.append(node)
                    if node.op != "placeholder":
                        self.operations[node] = self._operation(node)
        self.users: dict[fx.Node, list[Operation]] = {node: [] for node in self.values}
        for operation in self.operations.values():
            for source in operation.sources:
                self.users.setdefault(source, []).append(operation)
        self._is_constant: dict[fx.Node, bool] = {}
        self.n = self._layer_sizes()

    def _find_tensors(self, export: Export) -> dict[fx.Node, fx.Node]:
        """Fill in the parameters and buffers; which nodes are the same tensor as an earlier one."""
        tensors = tensors_by_name(self.model)
        names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
        by_name = {node.name: node for node in export.nodes}
        first = {id(tensor): node for node, tensor in self._tensors.items()}
        same = {}
        for spec in export.program.graph_signature.input_specs:
            if spec.target is None or spec.kind == InputKind.USER_INPUT:
                continue
            node = by_name[spec.arg.name]
            value = tensors.get(spec.target, export.program.constants.get(spec.target))
            if isinstance(value, Tensor):
                same[node] = first.setdefault(id(value), node)
                if same[node] is node:
                    self._tensors[node] = value
                    self.names[node] = names.get(id(value), [])
        return same

    def _outputs(self, export: Export, output: fx.Node) -> list[fx.Node | None]:
        returned: Any = output.args[0]
        kinds = [spec.kind for spec in export.program.graph_signature.output_specs]
        return [
            self.same.get(value, value) if isinstance(value, fx.Node) else None
            for value, kind in zip(returned, kinds, strict=True)
            if kind == OutputKind.USER_OUTPUT
        ]

    def _operation(self, node: fx.Node) -> Operation:
        same = self.same
        picked = node.target is operator.getitem
        call: Any = node.args[0] if picked else node
        args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), lambda n: same.get(n, n))
        return Operation(
            call.target,
            tuple(args),
            dict(kwargs),
            int(node.args[1]) if picked else None,  # type: ignore[arg-type]
            node,
            tuple(dict.fromkeys(_values_in((args, kwargs), same))),
            self,
        )

    def _layer_sizes(self) -> dict[str, int]:
        sizes: dict[str, set[Size]] = {}
        for operation in self.calls():
            name = operation.args[1]
            layer = self.layers[name]
            fitted = isinstance(layer, FittedTailDropout)
            n = layer.width if fitted else shape(operation.output)[layer_dim(operation)]
            sizes.setdefault(name, set()).add(n)
        self._called_with = {name: sorted(map(str, found)) for name, found in sizes.items()}
        return {
            name: n
            for name, found in sizes.items()
            for n in found
            if len(found) == 1 and isinstance(n, int)
        }

    def n_of(self, name: str) -> int:
        """The number of features of a layer.

        Raises:
            PruningError: the model does not call it, or with another number each time.
        """
        if name in self.n:
            return self.n[name]
        found = f"[{', '.join(sizes)}]" if (sizes := self._called_with.get(name)) else "no call"
        raise PruningError(
            f"layer {name!r} must be called with one number of features, got {found} while "
            "running the model on the example inputs"
        )

    @property
    def never_called(self) -> list[str]:
        """The layers that no path through the model's code calls."""
        return [name for name in self.layers if name not in self._called_with]

    def calls(self) -> list[Operation]:
        """The calls of all layers, in the order of computation."""
        return [o for o in self.operations.values() if o.target is LAYER]

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value is computed from parameters and buffers alone, at no size but theirs."""
        if node not in self._is_constant:
            operation = self.operations.get(node)
            self._is_constant[node] = node in self._tensors or (
                operation is not None
                and operation.target is not LAYER
                and len(operation.sources) > 0
                and not operation.reads_sizes
                and all(self.is_constant(source) for source in operation.sources)
            )
        return self._is_constant[node]

    def constant(self, node: fx.Node) -> Tensor:
        """The value of what is constant, in float64 on the CPU."""
        if node in self._tensors:
            value = self._tensors[node].detach().cpu()
            return value.double() if value.is_floating_point() else value
        operation = self.operations[node]
        return operation.run({source: self.constant(source) for source in operation.sources})


def _is_used(node: fx.Node) -> bool:
    """Not so are those of several results of an operation that nothing reads."""
    return bool(node.users) or node.target is not operator.getitem


def _values_in(arguments: Any, same: Mapping[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, lambda node: found.append(same.get(node, node)))
    return (node for node in found if is_tensor(node))


def count_of(place: "tuple[fx.Node, int]") -> int | None:
    """How many features lie along a dim of a value; None where that is no fixed number."""
    size = shape(place[0])[place[1]]
    return size if isinstance(size, int) else None


def layer_dim(operation: Operation) -> int:
    return int(operation.args[2])


def module_of(operation: Operation) -> str:
    """The name of the innermost module that it belongs to."""
    stack = list((operation.output.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def where(operation: Operation) -> str:
    """The operation in the user's words: its name and the module that it belongs to."""
    module = module_of(operation)
    if operation.target is LAYER:
        return f"layer {operation.args[1]!r}"
    name = getattr(operation.target, "overloadpacket", operation.target)
    name = getattr(name, "__name__", str(name))
    return f"{name} in module {module!r}" if module else f"{name} in the model's own forward"
