"""A model at some of its features, on the model's own tensors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.slices import slices_of
from ..layers.holding import HoldsDropout
from ..models.copies import PruningError, structural_copy, tensors_by_name
from ..models.insert import tail_dropouts
from ..models.together import draw_apart
from ..models.width import at_no_width
from .plan import PrunePlan
from .surgery import operate

_MOST_SLICES = 64  # that a tensor is put together from

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What a tensor of a narrowed network is of the model's.

    Attributes:
        ranges: for each dim, the ranges of the indices that stay.
        factor: what a norm's weights are multiplied by, once `plus` is added to them.
        plus: see `factor`.
    """

    ranges: tuple[tuple[Range, ...], ...]
    factor: float = 1.0
    plus: float = 0.0

    @property
    def regions(self) -> list[tuple[slice, ...]]:
        return [tuple(slice(*one) for one in region) for region in product(*self.ranges)]

    def of(self, slices: Iterator[Tensor]) -> Tensor:
        """From the slices of its regions."""
        value = self._joined(slices, 0)
        return value if self.factor == 1 else (value + self.plus) * self.factor - self.plus

    def _joined(self, slices: Iterator[Tensor], dim: int) -> Tensor:
        if dim == len(self.ranges):
            return next(slices)
        parts = [self._joined(slices, dim + 1) for _ in self.ranges[dim]]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


class Narrowed:
    """A small network whose tensors are slices of the model's, as soon as they are attached.

    Attributes:
        network: the small network. Its modules are its own.
        k: of each layer.
        layers: of the small network, by name.
        parts: what its tensors are, by name, where they are not those of the model.
    """

    def __init__(self, model: nn.Module, plan: PrunePlan) -> None:
        """
        Raises:
            PruningError: the small network is not the model with slices for tensors, and why; or
                as in `PrunePlan.apply`.
        """
        self.k = plan.k
        self.parts = _parts(model, plan)
        plan.verified_copy(model)  # or raises
        with at_no_width(model):  # a copy would never leave it
            self.network = structural_copy(model)
        draw_apart(self.network)
        operate(self.network, plan.cuts, (), plan.fits, plan.rescales)
        self.layers = {n: m for n, m in tail_dropouts(self.network).items() if n in plan.k}
        self._held = {f"{n}.dropout".strip(".") for n in _holders(model)}
        modules = dict(model.named_modules())
        self._modes = [
            (module, modules[name])
            for name, module in self.network.named_modules()
            if name not in self.layers
        ]

    def set_ks(self, ks: Mapping[str, Tensor]) -> None:
        """The k of each sample, by layer; of those that are not named, all that is there."""
        for name, layer in self.layers.items():
            layer.training = False
            if name in ks:
                layer.set_k(ks[name])
            else:  # a TailLinear or TailMLP would draw one
                layer.set_k(self.k[name] if name in self._held else None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module, of_model in self._modes:
            module.training = of_model.training
        return self.network(*args, **kwargs)


class Attachment:
    """What narrowed networks make of the tensors of their model."""

    def __init__(self, model: nn.Module, networks: Sequence[Narrowed]) -> None:
        homes = _homes(model)
        first: dict[int, str] = {}  # of the names of a tied tensor
        for name, tensor in tensors_by_name(model).items():
            first.setdefault(id(tensor), name)
        uses: dict[str, list[tuple[Part | None, list[Any]]]] = {n: [] for n in first.values()}
        for network in networks:
            places: dict[tuple[str, Part | None], list[Any]] = {}
            small = _homes(network.network)
            for name, tensor in tensors_by_name(model).items():
                key = first[id(tensor)], network.parts.get(name)
                places.setdefault(key, []).append(small[name])
            for (name, part), its_places in places.items():
                uses[name].append((part, its_places))
        self._sources = [
            (homes[name], tuple(r for part, _ in its for r in (part.regions if part else ())), its)
            for name, its in uses.items()
        ]
        self._recurrent = [
            module
            for network in networks
            for module in network.network.modules()
            if isinstance(module, nn.RNNBase)
        ]

    def attach(self) -> None:
        """Make the tensors of the small networks parts of what those of the model are now."""
        for (home, attribute), regions, uses in self._sources:
            tensor = home[attribute]
            slices = iter(slices_of(tensor, regions))
            for part, places in uses:
                value = tensor if part is None else part.of(slices)
                for place, name in places:
                    place[name] = value
        for module in self._recurrent:
            module._flat_weights = [module._parameters[n] for n in module._flat_weights_names]


def _homes(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each tensor stands: a dict of its module, and its name there."""
    return {
        f"{module}.{name}".strip("."): (place, name)
        for module, owner in model.named_modules(remove_duplicate=False)
        for place in (owner._parameters, owner._buffers)
        for name in place
    }


def _parts(model: nn.Module, plan: PrunePlan) -> dict[str, Part]:
    if plan.folds:
        raise PruningError(
            f"{plan.folds[0].name!r} would have to take in a constant of the features that go"
        )
    fitted = {fit.layer for fit in plan.fits}
    for name in _holders(model):
        if f"{name}.dropout".strip(".") in fitted:
            raise PruningError(f"{name!r} would have to slice what arrives, or add zeros to it")
    tensors = tensors_by_name(model)
    keeps: dict[str, dict[int, tuple[int, ...]]] = {}
    for cut in plan.cuts:
        keeps.setdefault(cut.name, {})[cut.dim] = cut.keep
    rescales = {name: rescale for rescale in plan.rescales for name in rescale.weights}
    parts = {}
    for name in keeps | rescales:
        keep = keeps.get(name, {})
        ranges = tuple(
            tuple(ranges(keep[dim])) if dim in keep else ((0, size),)
            for dim, size in enumerate(tensors[name].shape)
        )
        if math.prod(map(len, ranges)) > _MOST_SLICES:
            raise PruningError(f"what stays of {name!r} is scattered all over it")
        rescale = rescales.get(name)
        factor = math.sqrt(rescale.before / rescale.after) if rescale else 1.0
        parts[name] = Part(ranges, factor, rescale.plus if rescale else 0.0)
    return parts


def ranges(keep: Sequence[int]) -> Iterator[Range]:
    """Runs of consecutive indices."""
    start = 0
    for i in range(1, len(keep) + 1):
        if i == len(keep) or keep[i] != keep[i - 1] + 1:
            yield keep[start], keep[i - 1] + 1
            start = i


def _holders(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HoldsDropout)]
