"""The dataflow of a model, read from `torch.export`: values, and the operations between them."""

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, structural_copy, tensors_by_name
from ..models.inputs import Inputs, as_arguments
from ..models.insert import tail_dropouts


@torch.library.custom_op("taildropout::layer", mutates_args=())
def _layer_op(input: Tensor, name: str, dim: int, size: int) -> Tensor:
    """Stands for a TailDropout layer in an exported graph; `size` features come out of it."""
    shape = list(input.shape)
    shape[dim] = size
    return input.new_zeros(shape)


@_layer_op.register_fake
def _(input: Tensor, name: str, dim: int, size: int) -> Tensor:
    shape = list(input.shape)
    shape[dim] = size
    return input.new_empty(shape)


LAYER = torch.ops.taildropout.layer.default


@dataclass(frozen=True, eq=False)
class Operation:
    """What computes one value. Of an operation with several results, `pick` is the one."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pick: int | None
    output: fx.Node
    sources: tuple[fx.Node, ...]  # the values that it reads

    def arg(self, position: int, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else default

    def run(self, values: Mapping[fx.Node, Tensor], replaced: Mapping[int, Any] = {}) -> Tensor:
        """The result for other values, and with other arguments at the positions `replaced`."""
        args: Any = fx.node.map_arg(self.args, lambda node: values[node])
        kwargs: Any = fx.node.map_arg(self.kwargs, lambda node: values[node])
        args = [replaced.get(i, arg) for i, arg in enumerate(args)]
        result = self.target(*args, **kwargs)
        picked: Tensor = result if self.pick is None else result[self.pick]
        return picked


class Graph:
    """The model's dataflow in eval mode, in which each TailDropout is one operation.

    Attributes:
        values: all tensors, parameters and buffers first, then in the order of computation. A
            tied parameter is one value.
        operations: what computes a value; parameters, buffers and inputs have none.
        users: the values that are computed from a value.
        returned: values that the model returns.
        names: of parameters and buffers; tied ones have several.
        layer_dims: the dim of the features of each TailDropout, by name.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
        self.model = model
        self.layers = tail_dropouts(model)
        program = _exported(model, example_inputs)
        nodes: list[fx.Node] = list(program.graph.nodes)
        self._tensors: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, list[str]] = {}
        same = self._find_tensors(program, nodes)

        def values_in(arguments: Any) -> list[fx.Node]:
            found: list[fx.Node] = []
            fx.node.map_arg(arguments, lambda node: found.append(same.get(node, node)))
            return found

        self.operations: dict[fx.Node, Operation] = {}
        self.values: list[fx.Node] = []
        for node in nodes:
            if node.op == "output":
                self.returned = set(values_in(node.args))
            elif node.op == "placeholder":
                if same.get(node, node) is node and isinstance(node.meta.get("val"), Tensor):
                    self.values.append(node)
            elif isinstance(node.meta.get("val"), Tensor):
                picked = node.target is operator.getitem
                call: Any = node.args[0] if picked else node
                args, kwargs = fx.node.map_arg(
                    (call.args, dict(call.kwargs)), lambda n: same.get(n, n)
                )
                self.operations[node] = Operation(
                    call.target,
                    tuple(args),
                    dict(kwargs),
                    int(node.args[1]) if picked else None,  # type: ignore[arg-type]
                    node,
                    tuple(dict.fromkeys(values_in((args, kwargs)))),
                )
                self.values.append(node)
        self.users: dict[fx.Node, list[Operation]] = {node: [] for node in self.values}
        for operation in self.operations.values():
            for source in operation.sources:
                self.users.setdefault(source, []).append(operation)
        self._is_constant: dict[fx.Node, bool] = {}

    def _find_tensors(self, program: Any, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Fill in the parameters and buffers; which nodes are the same tensor as an earlier one."""
        tensors = tensors_by_name(self.model)
        by_name = {node.name: node for node in nodes}
        first: dict[int, fx.Node] = {}
        same = {}
        for spec in program.graph_signature.input_specs:
            if spec.target is None or spec.kind == InputKind.USER_INPUT:
                continue
            node = by_name[spec.arg.name]
            value = tensors.get(spec.target, program.constants.get(spec.target))
            if isinstance(value, Tensor):
                same[node] = first.setdefault(id(value), node)
                self._tensors[node] = value.detach()
                self.names[node] = [name for name, t in tensors.items() if t is value]
        return same

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value does not depend on the inputs."""
        if node not in self._is_constant:
            operation = self.operations.get(node)
            self._is_constant[node] = node in self._tensors or (
                operation is not None
                and operation.target is not LAYER
                and len(operation.sources) > 0
                and all(self.is_constant(source) for source in operation.sources)
            )
        return self._is_constant[node]

    def constant(self, node: fx.Node) -> Tensor:
        """The value of what is constant, in float64 on the CPU."""
        if node in self._tensors:
            value = self._tensors[node].cpu()
            return value.double() if value.is_floating_point() else value
        operation = self.operations[node]
        return operation.run({source: self.constant(source) for source in operation.sources})

    def layer_widths(self, name: str) -> set[int]:
        """The numbers of features with which a layer is called."""
        layer = self.layers[name]
        return {
            layer.width if isinstance(layer, FittedTailDropout) else shape(o.output)[layer_dim(o)]
            for o in self.operations.values()
            if o.target is LAYER and o.args[1] == name
        }


def _exported(model: nn.Module, example_inputs: Inputs) -> Any:
    traced = structural_copy(model).eval()
    for name, layer in tail_dropouts(traced).items():

        def stand_in(input: Tensor, name: str = name, layer: Any = layer) -> Tensor:
            dim = range(input.ndim)[layer.dropout_dim]
            fitted = isinstance(layer, FittedTailDropout)
            output: Tensor = _layer_op(input, name, dim, layer.size if fitted else input.shape[dim])
            return output

        layer.forward = stand_in  # type: ignore[method-assign]
    args, kwargs = as_arguments(example_inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own tracing
            program = torch.export.export(traced, args, kwargs, strict=False)
            program = program.run_decompositions({})  # free of in-place operations

    except Exception as error:
        raise PruningError(
            "the model must be exportable by torch.export, which reads its dataflow, but "
            f"exporting it failed: {str(error).strip().splitlines()[0]}"
        ) from error
    return program


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


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
