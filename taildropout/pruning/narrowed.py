"""A model at some of its features, on the model's own tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.slices import Region, slices_of
from ..layers import TailDropout
from ..layers.fitted import FittedTailDropout
from ..layers.holding import HoldsDropout
from ..layers.hooks import inserted_children
from ..models.copies import PruningError, structural_copy, tensors_by_name
from ..models.insert import remove, tail_dropouts
from ..models.names import name_in
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
    def regions(self) -> tuple[Region, ...]:
        return tuple(tuple(slice(*one) for one in region) for region in product(*self.ranges))

    @property
    def is_view(self) -> bool:
        """Whether the one slice is all of it, so that it shares the data of the model's tensor."""
        return self.factor == 1 and math.prod(map(len, self.ranges)) == 1

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

    def __init__(self, model: nn.Module, plan: PrunePlan, *, masks: bool) -> None:
        """
        Args:
            masks: whether its layers are to have ks of their own, below those of the plan.

        Raises:
            PruningError: the small network is not the model with slices for tensors, and why; or
                as in `PrunePlan.apply`.
        """
        self.k = plan.k
        self.parts = _parts(model, plan)
        plan.verified_copy(model)  # or raises
        with at_no_width(model):  # a copy would never leave it
            self.network = structural_copy(model)
        repeat_ks(self.network)
        draw_apart(self.network)
        operate(self.network, plan.cuts, (), plan.fits, plan.rescales)
        if not masks:
            _take_out_layers(self.network, plan.k)
        self.layers = {n: m for n, m in tail_dropouts(self.network).items() if n in plan.k}
        for layer in self.layers.values():
            layer.training = False  # and stays so, which lets all pass
        self._held = _held_dropouts(model)
        modules = dict(model.named_modules())
        self._modes = [
            (module, modules[name])
            for name, module in self.network.named_modules()
            if name not in self.layers
        ]

    def set_ks(self, ks: Mapping[str, Tensor]) -> None:
        """The k of each sample, by layer; of those that are not named, all that is there."""
        for name, layer in self.layers.items():
            if name in ks:
                layer.set_k(ks[name])
            elif name in self._held:  # a TailLinear or TailMLP would draw one
                layer.set_k(self.k[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module, of_model in self._modes:
            if module.training is not of_model.training:
                module.training = of_model.training
        return self.network(*args, **kwargs)


def repeat_ks(network: nn.Module) -> None:
    """Let a k that is set for each sample hold for all its rows, where a layer gets several."""
    for layer in tail_dropouts(network).values():
        if layer.together is not None and layer.together.rows is not None:
            layer.register_forward_pre_hook(_Repeats(layer.together.rows == "adjacent"))


class _Repeats:
    """A forward pre-hook of a layer: as many times the k of each sample as there are rows of it."""

    def __init__(self, adjacent: bool) -> None:
        self.adjacent = adjacent

    def __call__(self, layer: TailDropout, args: tuple[Tensor, ...]) -> None:
        k = layer.k
        if isinstance(k, Tensor) and len(k) and len(k) != len(args[0]):
            times = len(args[0]) // len(k)
            layer.set_k(k.repeat_interleave(times) if self.adjacent else k.repeat(times))


Home = tuple[dict[str, Any], str]
"""Where a tensor stands: the parameters or buffers of a module, and its name there."""


class Attachment:
    """What narrowed networks make of the tensors of their model."""

    def __init__(self, model: nn.Module, networks: Sequence[Narrowed]) -> None:
        homes, sources = _homes(model), dict[int, _Source]()
        for name, tensor in tensors_by_name(model).items():
            sources.setdefault(id(tensor), _Source(homes[name]))  # a tied one has several names
        for network in networks:
            small = _homes(network.network)
            for name, tensor in tensors_by_name(model).items():
                if name in small:
                    sources[id(tensor)].add(network, network.parts.get(name), small[name])
        self._sources = list(sources.values())
        self._recurrent = [
            module
            for network in networks
            for module in network.network.modules()
            if isinstance(module, nn.RNNBase)
        ]

    def attach(self) -> None:
        """Make the tensors of the networks parts of what those of the model are now."""
        recording = torch.is_grad_enabled()
        for source in self._sources:
            source.attach(recording)
        for module in self._recurrent:
            module._flat_weights = [module._parameters[n] for n in module._flat_weights_names]


class _Source:
    """A tensor of the model, and the places where it, or a part of it, stands in networks."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._places: dict[tuple[Narrowed, Part | None], list[Home]] = {}
        self._regions: tuple[Region, ...] = ()
        self._views_only = True
        self._attached: tuple[Tensor | None, int] = (None, 0)  # and where its data is

    def add(self, network: Narrowed, part: Part | None, place: Home) -> None:
        if (network, part) not in self._places and part is not None:
            self._regions += part.regions
            self._views_only &= part.is_view
        self._places.setdefault((network, part), []).append(place)

    def attach(self, recording: bool) -> None:
        home, name = self._home
        tensor: Tensor = home[name]
        is_whole = not self._regions
        last, data = self._attached
        if last is tensor and (is_whole or (not recording and data == tensor.data_ptr())):
            return
        slices = iter(slices_of(tensor, self._regions))
        for (_, part), places in self._places.items():
            value = tensor if part is None else part.of(slices)
            for place, name in places:
                place[name] = value
        keeps = is_whole or (self._views_only and not recording)
        self._attached = (tensor if keeps else None, 0 if is_whole else tensor.data_ptr())


def _homes(model: nn.Module) -> dict[str, Home]:
    return {
        name_in(module, name): (place, name)
        for module, owner in model.named_modules(remove_duplicate=False)
        for place in (owner._parameters, owner._buffers)
        for name in place
    }


def _parts(model: nn.Module, plan: PrunePlan) -> dict[str, Part]:
    if plan.folds:
        raise PruningError(
            f"{plan.folds[0].name!r} would have to take in a constant of the features that go"
        )
    for name in _held_dropouts(model) & {fit.layer for fit in plan.fits}:
        raise PruningError(f"{name!r} would have to slice what arrives, or add zeros to it")
    tensors = tensors_by_name(model)
    keeps: dict[str, dict[int, tuple[int, ...]]] = {}
    for cut in plan.cuts:
        keeps.setdefault(cut.name, {})[cut.dim] = cut.keep
    rescales = {name: rescale for rescale in plan.rescales for name in rescale.weights}
    parts = {}
    for name in keeps | rescales:
        keep = keeps.get(name, {})
        of_dims = tuple(
            (tuple(ranges(keep[dim])) or ((0, 0),)) if dim in keep else ((0, size),)
            for dim, size in enumerate(tensors[name].shape)
        )
        if math.prod(map(len, of_dims)) > _MOST_SLICES:
            raise PruningError(f"what stays of {name!r} is scattered all over it")
        rescale = rescales.get(name)
        parts[name] = Part(of_dims, *((rescale.factor, rescale.plus) if rescale else ()))
    return parts


def ranges(keep: Sequence[int]) -> Iterator[Range]:
    """Runs of consecutive indices."""
    start = 0
    for i in range(1, len(keep) + 1):
        if i == len(keep) or keep[i] != keep[i - 1] + 1:
            yield keep[start], keep[i - 1] + 1
            start = i


def _take_out_layers(network: nn.Module, names: Iterable[str]) -> None:
    """Those that `insert` put in, and that neither slice nor pad."""
    layers = tail_dropouts(network)
    for name in names:
        owner, _, child = name.rpartition(".")
        inserted = child in inserted_children(network.get_submodule(owner))
        if inserted and not isinstance(layers[name], FittedTailDropout):
            remove(network, name)


def _held_dropouts(model: nn.Module) -> set[str]:
    """The layers inside of TailLinears and TailMLPs."""
    modules = model.named_modules()
    return {name_in(n, "dropout") for n, module in modules if isinstance(module, HoldsDropout)}
