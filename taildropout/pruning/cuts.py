"""What it means for parameters and buffers that features go."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from ..functional.checks import check_k_at_most
from ..graph.constants import _Constants, _RulesOfAll, contribution, name_of_bias
from ..graph.dataflow import LAYER, Graph, layer_dim
from ..graph.features import _Staying
from ..graph.relations import Place
from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, tensors_by_name
from ..models.inputs import Inputs


@dataclass(frozen=True)
class Cut:
    """Of the `size` indices along `dim` of the tensor `name`, only `keep` stay."""

    name: str
    dim: int
    size: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Fold:
    """The constants that a consumer read from its removed columns: added to its bias."""

    name: str
    constant: Tensor


@dataclass(frozen=True)
class Fit:
    """A layer that takes the first `width` of what arrives, and hands `size` features on."""

    layer: str
    width: int
    size: int


@dataclass(frozen=True)
class Stay:
    """Something that can't go, though k says so: in front of the layer or behind it, and why."""

    layer: str
    side: str
    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """What can go from a model at given ks, and what can't."""

    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut]
    folds: list[Fold]
    fits: list[Fit] = field(default_factory=list)
    stays: list[Stay] = field(default_factory=list)


def analyse(
    model: nn.Module, k: dict[str, int], example_inputs: Inputs, *, trust_sizes: bool = True
) -> Findings:
    """Find all cuts that setting `k` (by layer name) allows.

    The dataflow does not tell a reshape by sizes that stand in the model's code from one by the
    sizes of its input. With `trust_sizes` it is taken for the latter. Without, features stay that
    are reshaped or split.

    Raises:
        PruningError: the model can't be exported, or it does not call a layer.
        ValueError: k is above the number of features.
    """
    graph = Graph(model, example_inputs)
    n, ks = {}, {}
    for name, layer in graph.layers.items():
        if isinstance(layer, FittedTailDropout):
            ks[name] = layer.width
    for name, value in k.items():
        widths = graph.layer_widths(name)
        if len(widths) != 1:
            raise PruningError(
                f"layer {name!r} must be called with one number of features, got "
                f"{sorted(widths) or 'no call'} while running the model on the example inputs"
            )
        n[name] = widths.pop()
        check_k_at_most(value, n[name])
        ks[name] = value
    rules = _RulesOfAll(graph, ks)
    constants = _Constants(graph, rules, ks)
    staying = _Staying(graph, rules, constants, ks, trust_sizes)
    return Findings(
        k,
        n,
        _cuts(graph, staying),
        list(_folds(graph, staying, constants)),
        list(_fits(graph, staying, ks)),
        list(_stays(graph, staying, k)),
    )


def _cuts(graph: Graph, staying: _Staying) -> list[Cut]:
    """In the order of the model's tensors."""
    order = {name: i for i, name in enumerate(tensors_by_name(graph.model))}
    cuts = [
        Cut(name, dim, len(stays), tuple(stays.nonzero().flatten().tolist()))
        for (node, dim), stays in staying.at.items()
        if (stays == 0).any()
        for name in graph.names.get(node, [])
    ]
    return sorted(cuts, key=lambda cut: (order[cut.name], cut.dim))


def _folds(graph: Graph, staying: _Staying, constants: _Constants) -> Iterator[Fold]:
    done = set()
    for read in staying.all_reads():
        facts, name = constants.known.get(read.place), name_of_bias(graph, read)
        if facts is None or name is None or name in done:
            continue
        values = facts.value * staying.gone(read.place)
        constant = contribution(graph, read, values) if values.any() else None
        if constant is None or not constant.any():
            continue
        rows = _rows(read.weight) if read.weight else None
        if not isinstance(read.bias, fx.Node) and rows in staying.at:
            constant = constant[~staying.gone(rows)]  # a new bias has only the rows that stay
        done.add(name)
        yield Fold(name, constant)


def _rows(weight: Place) -> Place:
    """Where its outputs lie."""
    node, dim = weight
    return node, 1 - dim if dim < 2 else 0


def _fits(graph: Graph, staying: _Staying, ks: dict[str, int]) -> Iterator[Fit]:
    fits = {}
    for node, operation in graph.operations.items():
        if operation.target is LAYER and operation.args[1] in ks:
            name, dim = operation.args[1], layer_dim(operation)
            arrives, leaves = staying.at[(operation.args[0], dim)] > 0, staying.at[(node, dim)] > 0
            width, size = int(leaves[: ks[name]].sum()), int(leaves.sum())
            if (int(arrives.sum()), size) != (width, width):
                fits[name] = Fit(name, width, size)
    yield from fits.values()


def _stays(graph: Graph, staying: _Staying, k: dict[str, int]) -> Iterator[Stay]:
    for node, operation in graph.operations.items():
        if operation.target is not LAYER or operation.args[1] not in k:
            continue
        name, dim = operation.args[1], layer_dim(operation)
        for side, place in (("in front of", (operation.args[0], dim)), ("behind", (node, dim))):
            for number in staying.at[place][k[name] :].unique().tolist():
                if number:
                    reason = staying.reasons[number]
                    yield Stay(name, side, reason.name, reason.text)
