"""What it means for parameters and buffers that features go."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx, nn

from ..functional.checks import check_k_at_most
from ..functional.linear import factor_of
from ..graph.dataflow import Dataflow, Operation, layer_dim, where
from ..graph.exports import LAYER, shape
from ..graph.features import Solution, contribution, name_of_bias, solve
from ..graph.norms import Norms
from ..graph.relations import Place, Read
from ..graph.rules import Sayings, is_known
from ..layers import TailLinear
from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, tensors_by_name
from ..models.inputs import Inputs
from ..models.names import name_in
from .cost import Cost, costs_by_module
from .outputs import OutputCut, cuts_of_outputs


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
class Rescale:
    """A root mean square norm that averages over `after` features instead of `before`.

    Its weights are multiplied by sqrt(before / after), or what they are with `plus` is; its eps by
    before / after.
    """

    weights: tuple[str, ...]
    plus: float
    module: str
    eps: str | None  # the attribute of the module; None where there is no eps
    before: int
    after: int

    @property
    def factor(self) -> float:
        """What the weights, with `plus`, are multiplied by."""
        return math.sqrt(self.before / self.after)


@dataclass(frozen=True)
class Fit:
    """A layer that takes the first `width` of what arrives, and hands `size` features on.

    `arrives` is how many there are, and `behind` the number of dims behind theirs; None where
    that differs from call to call.
    """

    layer: str
    width: int
    size: int
    arrives: int | None = None
    behind: int | None = None


@dataclass(frozen=True)
class ToLinear:
    """A TailLinear that becomes an nn.Linear: its bias and weight take in those of its k."""

    name: str
    k: int


@dataclass(frozen=True)
class Stay:
    """Something that can't go, though k says so: in front of the layer or behind it, and why."""

    layer: str
    side: str
    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """What can go from a model at given ks, and what can't.

    `of_norms` are the values to whose operations an eps belongs that is another afterwards: how
    many features the norm averages before and after.
    """

    solution: Solution
    k: dict[str, int]
    n: dict[str, int]
    cuts: list[Cut]
    folds: list[Fold]
    fits: list[Fit] = field(default_factory=list)
    stays: list[Stay] = field(default_factory=list)
    rescales: list[Rescale] = field(default_factory=list)
    of_norms: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    output_cuts: list[OutputCut] = field(default_factory=list)
    to_linears: list[ToLinear] = field(default_factory=list)


class Reading:
    """The dataflow of a model, read once and solved for any ks.

    `whole` are values whose operations read widths as numbers, as far as that is known: what they
    read and compute stays.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.flow = Dataflow(model, example_inputs, is_known)
        self.norms = Norms(self.flow, example_inputs)
        self.whole: set[fx.Node] = set()
        self._sayings = Sayings(self.norms)
        self.say = self._sayings.at({})  # what operations state, with no k set

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Of every module by name, "" for the whole model."""
        return costs_by_module(self.model, self.example_inputs)

    def find(
        self, k: dict[str, int], whole: Collection[fx.Node] = (), *, outputs: bool = False
    ) -> Findings:
        """All cuts that setting `k` (by layer name) allows. `whole`, `outputs` as in `solve`.

        Raises:
            PruningError: the model does not call a layer, or not with one number of features;
                with `outputs`, the features that it returns can't be cut to k.
            ValueError: k is above the number of features.
        """
        flow = self.flow
        n = {name: flow.n_of(name) for name in k}
        for name, value in k.items():
            check_k_at_most(value, n[name])
        to_linears = list(_to_linears(flow, k))
        fitted = {
            name: layer.width
            for name, layer in flow.layers.items()
            if isinstance(layer, FittedTailDropout)
        }
        ks = {**fitted, **k}
        found = solve(flow, self._sayings.at(ks), self.norms, ks, whole, outputs)
        stays = list(dict.fromkeys(_stays(flow, found, k)))
        behind = [f"{stay.name} {stay.reason}" for stay in stays if stay.side == "behind"]
        return Findings(
            found,
            k,
            n,
            _cuts(flow, found),
            list(_folds(flow, found, ks)),
            list(_fits(flow, found, ks)),
            stays,
            list(_rescales(flow, found, self.norms)),
            dict(_of_norms(found, self.norms)),
            cuts_of_outputs(flow, found, behind) if outputs else [],
            to_linears,
        )


def _cuts(flow: Dataflow, found: Solution) -> list[Cut]:
    """In the order of the model's tensors."""
    order = {name: i for i, name in enumerate(tensors_by_name(flow.model))}
    cuts = [
        Cut(name, dim, len(stays), tuple(stays.nonzero().flatten().tolist()))
        for (node, dim), stays in found.stays.items()
        if (stays == 0).any()
        for name in flow.names.get(node, [])
    ]
    cuts += [  # which has the outputs of the weight, and is in no dataflow
        Cut(name_in(linear, "tail_bias"), 1, cut.size, cut.keep)
        for linear in flow.tail_linears
        for cut in cuts
        if (cut.name, cut.dim) == (name_in(linear, "weight"), 0)
    ]
    return sorted(cuts, key=lambda cut: (order[cut.name], cut.dim))


def _to_linears(flow: Dataflow, k: dict[str, int]) -> Iterator[ToLinear]:
    """Of the TailLinears with a k, whose weight and bias must then be theirs alone."""
    for name, layer in flow.tail_linears.items():
        if layer not in k:
            continue
        linear = flow.model.get_submodule(name)
        if type(linear) is not TailLinear or linear._parameters.get("weight") is None:
            raise PruningError(
                f"module {name!r} must be a plain TailLinear to become an nn.Linear, got "
                f"{type(linear).__name__}, which has a forward or a parametrization of its own: "
                f"remove it, or leave layer {layer!r} out of k"
            )
        changed = ["weight"] if linear.scale is not None else []
        for attribute in (*changed, "bias") if k[layer] < flow.n_of(layer) else ():
            for node, names in flow.names.items():
                if name_in(name, attribute) in names:
                    others = [o for o in flow.users[node] if _layer_in_front(flow, o) != layer]
                    if others:
                        raise PruningError(
                            f"the {attribute} of TailLinear {name!r} can't take in what belongs to "
                            f"k = {k[layer]}, since {where(others[0])} reads it too"
                        )
        yield ToLinear(name, k[layer])


def _layer_in_front(flow: Dataflow, operation: Operation) -> str | None:
    """The TailDropout whose output it reads first, if it does."""
    first = flow.operations.get(operation.args[0]) if operation.args else None
    return str(first.args[1]) if first is not None and first.target is LAYER else None


def _folds(flow: Dataflow, found: Solution, ks: dict[str, int]) -> Iterator[Fold]:
    done = set()
    for read in found.reads:
        name = name_of_bias(flow, read)
        values = found.constants.at(read.place).value * found.gone(read.place)
        if name is None or name in done or not values.any():
            continue
        constant = contribution(flow, read, values)
        if constant is None or not constant.any():
            continue
        constant = constant * _factor_at(flow, read, ks)
        rows = _rows(read.weight) if read.weight else None
        if not isinstance(read.bias, fx.Node) and rows in found.stays:
            constant = constant[~found.gone(rows)]  # a new bias has only the rows that stay
        done.add(name)
        yield Fold(name, constant)


def _factor_at(flow: Dataflow, read: Read, ks: dict[str, int]) -> float:
    """What the TailLinear that reads there multiplies its prefix by."""
    layer = _layer_in_front(flow, read.operation)
    for name, its_layer in flow.tail_linears.items():
        linear = flow.model.get_submodule(name)
        if layer == its_layer and layer in ks and isinstance(linear, TailLinear):
            return 1.0 if linear.scale is None else factor_of(ks[layer], flow.n[layer])
    return 1.0


def _rows(weight: Place) -> Place:
    """Where its outputs lie."""
    node, dim = weight
    return node, 1 - dim if dim < 2 else 0


def _of_norms(found: Solution, norms: Norms) -> Iterator[tuple[fx.Node, tuple[int, int]]]:
    for norm in norms.found.values():
        before, after = norms.counts(norm, found.stays)
        if before != after and norm.adds is not None:
            yield norm.adds.output, (before, after)


def _rescales(flow: Dataflow, found: Solution, norms: Norms) -> Iterator[Rescale]:
    for norm in norms.found.values():
        before, after = norms.counts(norm, found.stays)
        if before == after:
            continue
        holder = norms.holder(norm)
        module, eps = ("", None) if holder is None else (holder.module, holder.attribute)
        for factor in norm.factors:
            names = tuple(flow.names[factor.weight])
            yield Rescale(names, factor.plus, module, eps, before, after)


def _fits(flow: Dataflow, found: Solution, ks: dict[str, int]) -> Iterator[Fit]:
    calls: dict[str, set[Fit]] = {}
    for operation in flow.calls():
        name, dim = operation.args[1], layer_dim(operation)
        if name in ks:
            arrives = int((found.stays[(operation.args[0], dim)] > 0).sum())
            leaves = found.stays[(operation.output, dim)] > 0
            width, size = int(leaves[: ks[name]].sum()), int(leaves.sum())
            behind = len(shape(operation.output)) - 1 - dim
            calls.setdefault(name, set()).add(Fit(name, width, size, arrives, behind))
    for name, fits in calls.items():
        is_fitted = isinstance(flow.layers[name], FittedTailDropout)
        if is_fitted or any((fit.arrives, fit.size) != (fit.width, fit.width) for fit in fits):
            one, *others = fits
            yield Fit(name, one.width, one.size) if others else one


def _stays(flow: Dataflow, found: Solution, k: dict[str, int]) -> Iterator[Stay]:
    for operation in flow.calls():
        name, dim = operation.args[1], layer_dim(operation)
        if name in k:
            places = {"in front of": (operation.args[0], dim), "behind": (operation.output, dim)}
            for side, place in places.items():
                for number in found.stays[place][k[name] :].unique().tolist():
                    if number:
                        yield Stay(name, side, *found.reasons[number])
