"""From what users say of widths to the k of each layer; a model at a width, and as it was."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_k
from ..layers import TailDropout
from ..layers.fitted import FittedTailDropout
from ..layers.settings import k_of_width
from .hooks import hooked
from .inputs import Inputs, call, cuda_devices
from .insert import layers_that_fit, tail_dropouts
from .names import fits_pattern, names_of_layer, plain_name

Width = int | float
"""An int counts features, a float in (0, 1] is a fraction of them."""

Widths = Width | Mapping[str, Width] | None
"""Of the layers of a model, see `at_width`."""


class Choice(int):
    """A k that knows its layer, and is an int in everything else. Made by `Scree.choose`.

    Attributes:
        layer: qualified name, or "" if it is not known.
        features: which features the k are, as in `scree`. Other than the first can't be pruned to.

    Example:
        >>> k = Choice(3, "encoder.1")
        >>> k, k.layer, type(k + 1)
        (3, 'encoder.1', <class 'int'>)
    """

    layer: str
    features: str

    def __new__(cls, k: int, layer: str = "", features: str = "first") -> "Choice":
        choice = super().__new__(cls, k)
        choice.layer, choice.features = layer, features
        return choice

    def __reduce__(self) -> tuple[type["Choice"], tuple[int, str, str]]:  # of copies and pickles
        return type(self), (int(self), self.layer, self.features)


class ChosenWidth(float):
    """A width that knows its layers, and is a float in everything else. Made by `Scree.choose`.

    Attributes:
        layer: the pattern of their names.
        features: as in `Choice`.
    """

    layer: str
    features: str

    def __new__(cls, width: float, layer: str = "*", features: str = "first") -> "ChosenWidth":
        chosen = super().__new__(cls, width)
        chosen.layer, chosen.features = layer, features
        return chosen

    def __reduce__(self) -> tuple[type["ChosenWidth"], tuple[float, str, str]]:
        return type(self), (float(self), self.layer, self.features)


# --- what was said, for each layer --------------------------------------------------------------


def widths_by_layer(model: nn.Module, widths: Widths) -> dict[str, Width]:
    """What is said of each TailDropout layer, checked: an int or a float, by qualified name."""
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError(
            "the model must contain a TailDropout layer to be pruned, measured or run at a width, "
            "and has none"
        )
    if widths is None:
        given: dict[str, Any] = {name: m.k for name, m in layers.items() if m.k is not None}
        if not given:
            raise ValueError("k=None prunes to the ks that are set, and none is: call set_k(k)")
    elif isinstance(widths, Mapping):
        given = _matched(model, widths)
    elif isinstance(widths, ChosenWidth):
        given = _matched(model, {widths.layer: widths})
    elif len(layers) == 1 or _is_fraction(widths):
        given = dict.fromkeys(layers, widths)
    elif isinstance(widths, Choice) and widths.layer:
        given = _matched(model, {widths.layer: widths})
    else:
        raise ValueError(
            f"the model has several TailDropout layers, give k as a dict: {sorted(layers)}, or one "
            f"fraction of all of them, where 1.0 is the full width; got {widths!r}"
        )
    return {
        name: check_width(width, name, layers[name].multiple_of) for name, width in given.items()
    }


def layer_ks(
    model: nn.Module,
    widths: Widths,
    n_of: Callable[[str], int],
    never_called: Collection[str] = (),
) -> dict[str, int]:
    """The k of each layer that is spoken of; `n_of` gives the n of a layer, for a fraction.

    Layers that the model never calls are left out, unless they are spoken of by name, or are all.
    """
    layers, given = tail_dropouts(model), widths_by_layer(model, widths)
    named = widths if isinstance(widths, Mapping) else {}
    called = {name: w for name, w in given.items() if name not in never_called or name in named}
    return {
        name: width if isinstance(width, int) else k_at(width, n_of(name), layers[name].multiple_of)
        for name, width in (called or given).items()
    }


def warn_of_never_called(names: Collection[str]) -> None:
    """Such a layer does nothing, though it was meant to."""
    if names:
        warnings.warn(
            f"the model never calls its TailDropout layers {sorted(names)}, so they cut nothing: "
            "insert them at modules that it calls, or remove them",
            stacklevel=3,
        )


def check_width(width: Any, name: str, multiple_of: int) -> Width:
    """The width of one layer, as an int or a float."""
    if isinstance(width, Choice | ChosenWidth) and width.features != "first":
        raise ValueError(
            f"a layer keeps its first features, got k={width} {width.features} ones for layer "
            f'{name!r}: choose from a scree with features="first"'
        )
    if _is_fraction(width):
        nothing = width == 0 and isinstance(width, ChosenWidth)  # measured, and good enough
        if not (0 < width <= 1 or nothing):
            raise ValueError(
                f"a fraction of the features must be in (0, 1], got {width} for layer {name!r}: "
                "a number of features must be an int"
            )
        return float(width)
    k = check_k(width)
    if isinstance(k, Tensor):
        raise TypeError(f"k must be one int for all samples, got {k} for layer {name!r}")
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k} for layer {name!r}")
    if k % multiple_of:
        raise ValueError(
            f"k of layer {name!r} must be a multiple of multiple_of={multiple_of}, got {k}"
        )
    return k


def k_at(width: Width, n: int, multiple_of: int = 1) -> int:
    """The k of an int or a fraction."""
    return k_of_width(width, n, multiple_of) if isinstance(width, float) else width


def rounded_up(k: int, multiple_of: int, n: int) -> int:
    """The next multiple from k on, or n where that is above it; a k above n stays what it is."""
    return max(k, min(-(-k // multiple_of) * multiple_of, n))


def _is_fraction(width: Any) -> bool:
    return isinstance(width, Real) and not isinstance(width, Integral)


def _matched(model: nn.Module, widths: Mapping[str, Any]) -> dict[str, Any]:
    """By layer: what its own name says, else the first pattern that fits, else "_default"."""
    given, used = {}, {"_default"}
    layers = tail_dropouts(model)
    for layer in layers:
        names = names_of_layer(model, layer)
        fitting = [key for key in widths if any(fits_pattern(key, name) for name in names)]
        used.update(fitting)
        keys = [*(key for key in fitting if key in names), *fitting]
        keys += ["_default"] if "_default" in widths else []
        if keys:
            given[layer] = widths[keys[0]]
    unknown = sorted(set(widths) - used, key=str)
    if unknown:
        raise ValueError(
            f"k must name TailDropout layers of the model, {sorted(layers)}, got {unknown}"
        )
    return given


# --- running a model ----------------------------------------------------------------------------


@contextmanager
def at_width(model: nn.Module, widths: Widths) -> Iterator[nn.Module]:
    """Run a model at a width, in training and in eval.

    Inside, each TailDropout layer that is spoken of keeps its first k features; `train()` and
    `eval()` don't end it, as trainers call them. A `set_k` or `using_k` inside is closer to the
    call, and wins. Outside all is as before, also after an exception.

    Args:
        model: also one that is compiled or wrapped (DistributedDataParallel, checkpoints).
        widths: a float in (0, 1] is the fraction of the features that every layer keeps, rounded
            up. An int is the k of a model with one layer, and what `Scree.choose` returns that of
            the layer that was measured. A dict says it for each layer: its keys are qualified
            names, patterns with `*`, `?` and `[...]` as in a shell, regular expressions
            (`"re:..."`) or `"_default"` for the rest; a layer's own name goes first, then the
            first pattern that fits. None: the ks that are set.

    Raises:
        ValueError: no TailDropout layer, an int for several layers, a name or pattern that fits
            none, a negative k, a fraction outside (0, 1].
        TypeError: a k that is no number, or a tensor.

    Example:
        >>> model = nn.Sequential(TailDropout(), nn.ReLU(), TailDropout())
        >>> with at_width(model, 0.5):
        ...     model.eval()(torch.ones(1, 4))
        tensor([[1., 1., 0., 0.]])
        >>> with at_width(model, {"0": 3, "_default": 1.0}):
        ...     model.train()(torch.ones(1, 4))
        tensor([[1., 1., 1., 0.]])
        >>> model.eval()(torch.ones(1, 4))
        tensor([[1., 1., 1., 1.]])
    """
    given = widths_by_layer(model, widths)
    with ExitStack() as stack:
        for name, layer in tail_dropouts(model).items():
            if name in given:
                stack.enter_context(layer.using_width(given[name]))
        yield model


@contextmanager
def at_no_width(model: nn.Module) -> Iterator[None]:
    """Inside, only the ks that are set are in force: a copy would never leave a with block."""
    with ExitStack() as stack:
        for layer in tail_dropouts(model).values():
            k = layer.k
            stack.enter_context(layer.using_width(None))
            layer.set_k(k)
        yield


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """In eval mode, at the ks that are set; afterwards modes, ks and random numbers as before."""
    training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=cuda_devices(model)), ExitStack() as stack:
        for layer in tail_dropouts(model).values():
            if layer.k is not None:
                stack.enter_context(layer.using_k(layer.k))
        try:
            for module in training:
                module.training = False  # eval() clears k, and some models do more in it
            yield
        finally:
            for module, mode in training.items():
                module.training = mode


# --- one layer ----------------------------------------------------------------------------------


def find_layer(model: nn.Module, name: str | None) -> tuple[str, TailDropout]:
    """The layer that is named, or the only one, and its name without what wraps the model."""
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError("the model must contain a TailDropout layer to be measured, and has none")
    for own, layer in layers.items():
        if name in names_of_layer(model, own) or (name is None and len(layers) == 1):
            return plain_name(model, own), layer
    raise ValueError(
        f"layer must name one of the model's TailDropout layers {sorted(layers)}, got {name!r}"
    )


def matched_layers(model: nn.Module, pattern: str) -> dict[str, TailDropout]:
    """The layers whose names a pattern fits."""
    found = layers_that_fit(model, pattern)
    if not found:
        raise ValueError(
            "layer must fit TailDropout layers of the model, "
            f"{sorted(tail_dropouts(model))}, got {pattern!r}"
        )
    return found


def features_of(
    model: nn.Module, layers: Mapping[str, TailDropout], inputs: Inputs
) -> dict[TailDropout, int]:
    """n of each layer, by running the model once.

    Warns of layers that the model never calls; where there are others, these are left out.
    """
    seen: dict[TailDropout, set[int]] = {other: set() for other in tail_dropouts(model).values()}

    def look(module: TailDropout, args: Any, output: Tensor) -> None:
        if isinstance(module, FittedTailDropout):  # zeros come behind its features
            seen[module].add(module.width)
        else:
            seen[module].add(output.shape[module.dropout_dim])

    with ExitStack() as stack:
        for layer in seen:  # where a k is set, a TailLinear or TailMLP need not call its layer
            stack.enter_context(layer.using_width(None))
        stack.enter_context(hooked(dict.fromkeys(seen, look)))
        call(model, inputs)
    called = {name: layer for name, layer in layers.items() if seen[layer]} or layers
    for name, layer in called.items():
        if len(seen[layer]) != 1:
            raise ValueError(
                f"layer {name!r} must be called by the model with one number of features, "
                f"got {sorted(seen[layer]) or 'no call'}"
            )
    warn_of_never_called([name for name, m in tail_dropouts(model).items() if not seen[m]])
    return {layer: seen[layer].pop() for layer in called.values()}


def check_ks(ks: Iterable[Width], name: str, multiple_of: int) -> list[Width]:
    """Of one layer, to be measured."""
    plain = [
        k.item() if isinstance(k, Tensor) else int(k) if isinstance(k, Choice) else k for k in ks
    ]
    checked = [check_width(k, name, multiple_of) for k in plain]
    if not checked:
        raise ValueError("ks must be at least one k, got none")
    return checked


def check_widths(widths: Iterable[Width], name: str, argument: str = "ks") -> list[float]:
    """Of several layers, to be measured or saved: fractions."""
    checked = []
    for width in widths:
        if not _is_fraction(width):
            raise ValueError(
                f"{argument} of several layers, {name!r}, must be widths, floats in (0, 1] where "
                f"1.0 is the full width, got {width!r}"
            )
        checked.append(float(check_width(float(width), name, 1)))
    if not checked:
        raise ValueError(f"{argument} must be at least one width, got none")
    return sorted(set(checked))
