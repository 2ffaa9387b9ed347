"""The dataflow of a model, read once from `torch.export`: values, and the operations between them.

Sizes are symbols wherever the model allows: what is read holds for every batch, length and
resolution that the model takes, and a size that the model fixes is a number.
"""

import operator
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, structural_copy, tensors_by_name
from ..models.inputs import Inputs, as_arguments
from ..models.insert import tail_dropouts

Size: TypeAlias = int | sympy.Expr


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
        names: of parameters and buffers; tied ones have several.
        layers: the model's TailDropouts by name.
        n: the number of features of each layer that the model calls with one number of them.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        knows: Callable[[Any], bool] = lambda target: True,
    ) -> None:
        self.model = model
        self.layers = tail_dropouts(model)
        program = _exported(model, example_inputs, knows)
        nodes: list[fx.Node] = list(program.graph.nodes)
        self._tensors: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, list[str]] = {}
        same = self._find_tensors(program, nodes)

        def values_in(arguments: Any) -> list[fx.Node]:
            found: list[fx.Node] = []
            fx.node.map_arg(arguments, lambda node: found.append(same.get(node, node)))
            return [node for node in found if is_tensor(node)]

        self.operations: dict[fx.Node, Operation] = {}
        self.values: list[fx.Node] = []
        for node in nodes:
            if node.op == "output":
                self.returned = set(values_in(node.args))
            elif not is_tensor(node):
                continue
            elif node.op == "placeholder":
                if same.get(node, node) is node:
                    self.values.append(node)
            else:
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
                    self,
                )
                self.values.append(node)
        self.users: dict[fx.Node, list[Operation]] = {node: [] for node in self.values}
        for operation in self.operations.values():
            for source in operation.sources:
                self.users.setdefault(source, []).append(operation)
        self._is_constant: dict[fx.Node, bool] = {}
        self.n = self._layer_sizes()

    def _find_tensors(self, program: Any, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Fill in the parameters and buffers; which nodes are the same tensor as an earlier one."""
        tensors = tensors_by_name(self.model)
        names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
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
                self.names[node] = names.get(id(value), [])
        return same

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
            value = self._tensors[node].cpu()
            return value.double() if value.is_floating_point() else value
        operation = self.operations[node]
        return operation.run({source: self.constant(source) for source in operation.sources})


def _exported(model: nn.Module, example_inputs: Inputs, knows: Callable[[Any], bool]) -> Any:
    traced = structural_copy(model).eval()
    for name, layer in tail_dropouts(traced).items():

        def stand_in(input: Tensor, name: str = name, layer: Any = layer) -> Tensor:
            dim = range(input.ndim)[layer.dropout_dim]
            fitted = isinstance(layer, FittedTailDropout)
            output: Tensor = _layer_op(input, name, dim, layer.size if fitted else input.shape[dim])
            return output

        layer.forward = stand_in  # type: ignore[method-assign]
    tensors = [x for x in tree_leaves(as_arguments(example_inputs)) if isinstance(x, Tensor)]
    if any(x.ndim > 0 and len(x) == 0 for x in tensors[:1]):
        raise PruningError("the example inputs must hold at least one sample")
    symbols = [set(range(x.ndim)) for x in tensors]  # the dims whose size is one
    try:
        program = _export(traced, example_inputs, tensors, symbols, knows)
        tied = _tied_to_numbers(program)
        if any(tied):
            symbols = [free - fixed for free, fixed in zip(symbols, tied, strict=True)]
            program = _export(traced, example_inputs, tensors, symbols, knows)
        if not any(_tied_to_numbers(program)):
            return program
    except Exception:  # the sizes of some models can't be symbols
        pass
    try:
        return _export(traced, example_inputs, tensors, [set() for _ in tensors], knows)
    except Exception as error:
        raise PruningError(
            "the model must be exportable by torch.export, which reads its dataflow, but "
            f"exporting it failed: {str(error).strip().splitlines()[0]}"
        ) from error


def _export(
    model: nn.Module,
    example_inputs: Inputs,
    tensors: list[Tensor],
    symbols: list[set[int]],
    knows: Callable[[Any], bool],
) -> Any:
    args, kwargs = as_arguments(example_inputs)
    sizes = ShapesCollection()
    for tensor, dims in zip(tensors, symbols, strict=True):
        sizes[tensor] = tuple(Dim.AUTO if d in dims else Dim.STATIC for d in range(tensor.ndim))
    with warnings.catch_warnings(), torch.no_grad(), _sizes_are_symbols(any(symbols)):
        warnings.simplefilter("ignore")  # torch's, about its own tracing
        program = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=sizes.dynamic_shapes(model, args, kwargs) if any(symbols) else None,
            strict=False,
        )
        if _needs_decomposing(program.graph, knows):
            program = program.run_decompositions({})
    return program


def _tied_to_numbers(program: Any) -> list[set[int]]:
    """The dims of each input that must multiply to a number, as where pixels are flattened."""
    inputs = [
        node.meta["val"]
        for node, spec in zip(
            (node for node in program.graph.nodes if node.op == "placeholder"),
            program.graph_signature.input_specs,
            strict=True,
        )
        if spec.kind == InputKind.USER_INPUT and is_tensor(node)
    ]
    tied: set[Any] = set()
    for value in inputs[:1]:
        environment = value.fake_mode.shape_env
        for guard in environment.guards if environment is not None else ():
            relation = environment.replace(guard.expr)
            if isinstance(relation, sympy.Eq) and any(side.is_number for side in relation.args):
                tied |= relation.free_symbols
    return [
        {d for d, size in enumerate(map(size_of, value.shape)) if _symbols_of(size) & tied}
        for value in inputs
    ]


def _symbols_of(size: Size) -> set[Any]:
    return set() if isinstance(size, int) else size.free_symbols


def _sizes_are_symbols(any_are: bool) -> AbstractContextManager[None]:
    """Also those that are 0 or 1 in the example, which torch treats as numbers otherwise."""
    if not any_are or not hasattr(symbolic_config, "backed_size_oblivious"):  # torch 2.6
        return nullcontext()
    config: Any = symbolic_config
    patched: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


def _needs_decomposing(graph: fx.Graph, knows: Callable[[Any], bool]) -> bool:
    """Where something is changed in place, values are no values; no layer is to be hidden; and
    what torch writes in terms of simpler operations may be of ones that are known."""
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    if any(isinstance(target, torch._ops.HigherOrderOperator) for target in targets):
        return True
    operations = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    return any(
        op._schema.is_mutable or (op._can_decompose() and not knows(op)) for op in operations
    )


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The size of each dim: a number, or an expression of symbols."""
    return tuple(size_of(size) for size in node.meta["val"].shape)


def size_of(size: int | torch.SymInt) -> Size:
    if isinstance(size, int):
        return size
    expression: sympy.Expr = size.node.shape_env.replace(size.node.expr)
    return int(expression) if expression.is_number else expression


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
