"""What `torch.export` reads of a model: its operations, with symbols for sizes."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import sympy
import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..layers.fitted import FittedTailDropout
from ..models.copies import structural_copy
from ..models.fakes import quiet
from ..models.inputs import Inputs, as_arguments, tensors_of
from ..models.insert import tail_dropouts

Size: TypeAlias = int | sympy.Expr
Knows: TypeAlias = Callable[[Any], bool]

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


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


@dataclass(frozen=True)
class Comparison:
    """Sizes that were compared while the model ran, and whether by an operation of torch's."""

    relation: sympy.Basic
    of_torch: bool

    def holds_at(self, values: dict[sympy.Symbol, int]) -> bool | None:
        """None where it means nothing, since something is divided by zero."""
        try:
            found = self.relation.subs(values)
        except ZeroDivisionError:
            return None
        return bool(found) if found in (sympy.true, sympy.false) else None

    @property
    def ties(self) -> bool:
        """Whether sizes must come to a number, as where pixels are flattened.

        Torch compares with 0, too, to see that sizes divide each other.
        """
        return isinstance(self.relation, sympy.Eq) and any(
            side.is_number and not (self.of_torch and side == 0) for side in self.relation.args
        )


Compared: TypeAlias = tuple[sympy.Basic, dict[sympy.Symbol, tuple[int, int]]]
"""A comparison as it was made, with the dim and the size that each of its symbols stood for."""


class Tied(Exception):
    """Of the inputs, some sizes must come to a number: the dims of each tensor that have them.

    With what the model's code has compared before.
    """

    def __init__(self, dims: list[set[int]], compared: list[Compared]) -> None:
        self.dims = dims
        self.compared = compared


@dataclass(frozen=True, eq=False)
class Export:
    """The model's operations at the sizes of `inputs`, and at all others that compare alike.

    Attributes:
        program: what torch exported.
        inputs: what it was exported with.
        symbols: the dims of each tensor among them that may have a symbol for a size.
    """

    program: Any
    inputs: Inputs
    symbols: list[set[int]]

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return list(self.program.graph.nodes)

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        """Of the tensors among the inputs, in their order."""
        placeholders = (node for node in self.nodes if node.op == "placeholder")
        return [
            node
            for node, spec in zip(
                placeholders, self.program.graph_signature.input_specs, strict=True
            )
            if spec.kind == InputKind.USER_INPUT and is_tensor(node)
        ]

    @cached_property
    def _environments(self) -> list[Any]:
        """Where torch keeps what it knows of symbols."""
        found = {node.meta["val"].fake_mode.shape_env for node in self.placeholders}
        return [environment for environment in found if environment is not None]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Those that depend on sizes still."""
        found: dict[sympy.Basic, Comparison] = {}
        for environment in self._environments:
            for comparison in _comparisons(environment, environment.guards):
                found.setdefault(comparison.relation, comparison)
        return list(found.values())

    @cached_property
    def numbers(self) -> list[tuple[int, int]]:
        """The dims and sizes of inputs that code other than torch's uses as numbers."""
        found = [
            (dim, size)
            for tensor, free in zip(
                tensors_of(as_arguments(self.inputs)), self.symbols, strict=True
            )
            for dim, size in enumerate(tensor.shape)
            if dim not in free
        ]
        for environment in self._environments:
            for guard in environment.guards:
                for symbol in guard.expr.free_symbols if _counted_by_caller(guard) else ():
                    size = environment.replace(symbol)
                    if size.is_number:
                        found.append((_dim_of(environment, symbol), int(size)))
        return list(dict.fromkeys(found))

    @cached_property
    def compared(self) -> list[Compared]:
        """What the model's code compared, also of sizes that turned out to be numbers later."""
        return [found for environment in self._environments for found in _compared(environment)]

    def values_at(self, inputs: Inputs) -> dict[sympy.Symbol, int] | None:
        """What the symbols are at other inputs; None where these are of other fixed sizes."""
        values: dict[sympy.Symbol, int] = {}
        tensors = tensors_of(as_arguments(inputs))
        pairs = [
            (size, actual)
            for node, tensor in zip(self.placeholders, tensors, strict=True)
            for size, actual in zip(shape(node), tensor.shape, strict=True)
        ]
        for size, actual in pairs:
            if isinstance(size, sympy.Symbol):
                values.setdefault(size, actual)
        consistent = all(evaluated(size, values) == actual for size, actual in pairs)
        return values if consistent else None

    def covers(self, inputs: Inputs) -> bool:
        """Whether the model takes this path at these sizes."""
        values = self.values_at(inputs)
        return values is not None and all(
            comparison.of_torch or comparison.holds_at(values) for comparison in self.comparisons
        )

    def resized(self, values: dict[sympy.Symbol, int]) -> Any:
        """The inputs where symbols have other values: with fewer entries, or with some twice."""
        shapes = [[evaluated(size, values) for size in shape(node)] for node in self.placeholders]
        return of_shapes(self.inputs, shapes)


def evaluated(size: Size, values: dict[sympy.Symbol, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(values))


def _comparisons(environment: Any, guards: Sequence[Any]) -> Iterator[Comparison]:
    """Those among what torch has found out that depend on sizes still."""
    for guard in guards:
        relation = environment.replace(guard.expr)
        if relation.free_symbols:
            yield Comparison(relation, _of_torch(guard))


def _of_torch(guard: Any) -> bool:
    """Torch's operations compare sizes too; what they compute is the same however that ends."""
    return _file(guard).startswith(
        ("_ops.py", "_refs/", "_prims", "_meta_registrations.py", "_decomp/", "_subclasses/")
    )


def _counted_by_caller(guard: Any) -> bool:
    """Whether the model's code may see the number, also as that of the parts that it is handed."""
    return not _of_torch(guard) or _file(guard) == "_ops.py"


def _file(guard: Any) -> str:
    """The file whose code compared, its path seen from torch's own folder where it lies there."""
    frame = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    return str(getattr(frame, "filename", "")).removeprefix(_TORCH)


# ----------------------------------------------------------------------------------- one export


def traceable(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors with the model, in which each TailDropout is one operation."""
    traced = structural_copy(model).eval()
    for name, layer in tail_dropouts(traced).items():

        def stand_in(input: Tensor, name: str = name, layer: Any = layer) -> Tensor:
            dim = range(input.ndim)[layer.dropout_dim]
            fitted = isinstance(layer, FittedTailDropout)
            output: Tensor = _layer_op(input, name, dim, layer.size if fitted else input.shape[dim])
            return output

        layer.forward = stand_in  # type: ignore[method-assign]
    return traced


def export(
    model: nn.Module,
    inputs: Inputs,
    symbols: list[set[int]],
    knows: Knows,
    *,
    untied: bool = False,
) -> Export:
    """One call of `torch.export`, with symbols for the sizes of these dims.

    Args:
        model: as `traceable` makes it.
        inputs: what to call it with.
        symbols: dims of each tensor among the inputs.
        knows: which operations need not be written in terms of simpler ones.
        untied: whether sizes that must come to a number may not be symbols.

    Raises:
        Tied: they are; at the first operation that shows it.
    """
    args, kwargs = _aliases(as_arguments(inputs))
    sizes = ShapesCollection()
    for tensor, dims in zip(tensors_of((args, kwargs)), symbols, strict=True):
        sizes[tensor] = tuple(Dim.AUTO if d in dims else Dim.STATIC for d in range(tensor.ndim))
    with quiet(), warnings.catch_warnings(), torch.no_grad(), _sizes_are_symbols(any(symbols)):
        warnings.simplefilter("ignore")  # torch's, about its own tracing
        with _all_named(model, kwargs), _UntilTied(model) if untied else nullcontext():
            program = torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=sizes.dynamic_shapes(model, args, kwargs) if any(symbols) else None,
                strict=False,
            )
        _functionalise(program.graph)
        if _needs_decomposing(program.graph, knows):
            program = program.run_decompositions({})
    found = Export(program, inputs, symbols)
    if untied:  # once more: the model's code may have caught what was raised
        shapes = [node.meta["val"].shape for node in found.placeholders]
        tied = _dims_of(_tied_symbols(found.comparisons), shapes)
        if any(tied):
            raise Tied(tied, found.compared)
    return found


def _aliases(arguments: Any) -> Any:
    """The same numbers in other tensors: torch.export marks tensors, and leaves the marks."""

    def alias(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)

    return tree_map(alias, arguments)


@contextmanager
def _all_named(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Inside, the names of all arguments stand in the signature, also of those in `**kwargs`.

    For the sizes of others torch.export has no symbols.
    """
    forward, own = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    others = set(kwargs) - {p.name for p in named}
    if len(named) == len(signature.parameters) or not others:
        yield
        return

    def named_forward(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
    new = signature.replace(parameters=[*named, *(p for p in more if p.name in others)])
    named_forward.__signature__ = new  # type: ignore[attr-defined]
    model.forward = named_forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class _UntilTied(TorchFunctionMode):
    """Stops the model at the operation that ties sizes of its inputs to a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shapes: list[Sequence[int | torch.SymInt]] = []
        self.environment: Any = None
        self.seen = 0  # of what torch has found out
        self.hook = model.register_forward_pre_hook(self._start, with_kwargs=True)

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()
        super().__exit__(*error)

    def _start(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.hook.remove()  # some modules take another path where they have hooks
        self.shapes = [tensor.shape for tensor in tensors_of((args, kwargs))]
        symbols = [n for shape in self.shapes for n in shape if isinstance(n, torch.SymInt)]
        self.environment = symbols[0].node.shape_env if symbols else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:  # torch takes no size that is a symbol for a one, which it broadcasts
            self._stop_if(_symbols_for_one)
            raise
        self._stop_if(_tied_in)
        return result

    def _stop_if(self, find_tied: Callable[[Any, list[Any]], set[sympy.Symbol]]) -> None:
        """Raises Tied where the sizes that it finds, in what is new, are those of inputs."""
        if self.environment is not None and len(self.environment.guards) > self.seen:
            new = self.environment.guards[self.seen :]
            self.seen += len(new)
            tied = _dims_of(find_tied(self.environment, new), self.shapes)
            if any(tied):
                raise Tied(tied, _compared(self.environment))


def _dim_of(environment: Any, symbol: sympy.Symbol) -> int:
    """Of the input whose size the symbol is."""
    return int(environment.var_to_sources[symbol][0].idx)


def _compared(environment: Any) -> list[Compared]:
    """By code other than torch's; sizes of one also by torch, which broadcasts them."""
    return [
        (guard.expr, _sizes_in(environment, guard))
        for guard in environment.guards
        if not _of_torch(guard) or _symbols_for_one(environment, [guard])
    ]


def _sizes_in(environment: Any, guard: Any) -> dict[sympy.Symbol, tuple[int, int]]:
    """The dim and the size that each symbol of a comparison stood for."""
    in_torch_2_6 = not hasattr(environment, "backed_var_to_val")
    stood_for = environment.var_to_val if in_torch_2_6 else environment.backed_var_to_val
    symbols = guard.expr.free_symbols
    return {symbol: (_dim_of(environment, symbol), int(stood_for[symbol])) for symbol in symbols}


def _symbols_for_one(environment: Any, guards: Sequence[Any]) -> set[sympy.Symbol]:
    sizes = (item for guard in guards for item in _sizes_in(environment, guard).items())
    return {symbol for symbol, (_, size) in sizes if size == 1}


def _tied_in(environment: Any, guards: Sequence[Any]) -> set[sympy.Symbol]:
    return _tied_symbols(_comparisons(environment, guards))


def _tied_symbols(comparisons: Iterable[Comparison]) -> set[sympy.Symbol]:
    return {s for c in comparisons if c.ties for s in c.relation.free_symbols}


def _dims_of(
    symbols: set[sympy.Symbol], shapes: Iterable[Sequence[int | torch.SymInt]]
) -> list[set[int]]:
    """The dims of each tensor whose sizes these symbols stand in."""
    return [{d for d, n in enumerate(sizes) if _symbols_of(n) & symbols} for sizes in shapes]


def _symbols_of(size: int | torch.SymInt) -> set[sympy.Symbol]:
    found = size_of(size)
    return set() if isinstance(found, int) else found.free_symbols


@contextmanager
def _sizes_are_symbols(any_are: bool) -> Iterator[None]:
    """Also those that are 0 or 1 in the example, which torch treats as numbers otherwise."""
    if not any_are:
        yield
        return
    import torch._dynamo.config  # which torch.export imports too

    dynamo, symbolic = cast(Any, torch._dynamo.config), cast(Any, symbolic_config)
    with ExitStack() as stack:
        # What torch remembers of the operations that it has run costs more than it saves here.
        stack.enter_context(dynamo.patch(fake_tensor_cache_enabled=False))
        if hasattr(symbolic, "backed_size_oblivious"):  # not in torch 2.6
            stack.enter_context(symbolic.patch(backed_size_oblivious=True))
        yield


def _functionalise(graph: fx.Graph) -> None:
    """Operations that change a tensor in place make a new one, where no other value shows it.

    Where one does, torch's decomposition finds out what becomes of it, which takes much longer.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        functional = _functional(node.target)
        changed = node.args[0] if node.args else None
        if functional is None or not isinstance(changed, fx.Node) or _is_view(changed):
            continue
        others = [user for user in changed.users if user is not node]
        if any(_is_view(user) and order[user] < order[node] for user in others):
            continue
        node.target = functional
        for user in others:
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


def _functional(target: Any) -> Any:
    """`add.Tensor` of `add_.Tensor`; None of what changes nothing or has no such twin."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    changes = [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    packet = getattr(torch.ops.aten, target.overloadpacket.__name__.removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    is_twin = twin is not None and twin is not target and not twin._schema.is_mutable
    return twin if is_twin and changes == target._schema.arguments[:1] else None


def _is_view(node: fx.Node) -> bool:
    """Whether the value may be another one's, or a part of it; parameters and inputs are given."""
    schema = getattr(node.target, "_schema", None)
    may_return_input = "dropout" in str(node.target)  # which it does in eval mode
    return schema is None or may_return_input or any(r.alias_info for r in schema.returns)


def _needs_decomposing(graph: fx.Graph, knows: Knows) -> bool:
    """Where something is changed in place, values are no values; no layer is to be hidden; and
    what torch writes in terms of simpler operations may be of ones that are known."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(node.target, torch._ops.OpOverload) and (
            node.target._schema.is_mutable
            or (_makes_floats(node) and node.target._can_decompose() and not knows(node.target))
        ):
            return True
    return False


def _makes_floats(node: fx.Node) -> bool:
    made = tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in made)


def of_shapes(inputs: Inputs, shapes: Sequence[Sequence[int]]) -> Any:
    """Inputs of these shapes: the first entries along each dim, or all of them again and again."""
    remaining = iter(shapes)

    def resized(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(next(remaining)):
            if size != tensor.shape[dim]:
                index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
                tensor = tensor.index_select(dim, index)
        return tensor

    args, kwargs = as_arguments(inputs)
    new_args, new_kwargs = tree_map(
        lambda value: resized(value) if isinstance(value, Tensor) else value, (args, kwargs)
    )
    return new_kwargs if new_kwargs else new_args


# -------------------------------------------------------------------------------------- of values


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
