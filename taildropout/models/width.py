"""From what users say of widths to the k of each layer, and the state that a model comes back in."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_k
from ..layers import TailDropout
from ..layers.fitted import FittedTailDropout
from .inputs import Inputs, call
from .insert import tail_dropouts


def find_layer(model: nn.Module, name: str | None) -> tuple[str, TailDropout]:
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError("the model must contain a TailDropout layer to be swept, and has none")
    if name is None and len(layers) == 1:
        return next(iter(layers.items()))
    if name not in layers:
        raise ValueError(
            f"layer must name one of the model's TailDropout layers {sorted(layers)}, got {name!r}"
        )
    return name, layers[name]


def check_ks(ks: Iterable[int]) -> list[int]:
    checked = set()
    for k in ks:
        value = check_k(k)
        checked.add(int(value))
    if not checked or min(checked) < 0:
        raise ValueError(f"ks must be at least one k, each at least 0, got {sorted(checked)}")
    return sorted(checked)


def features_of(model: nn.Module, layer: TailDropout, name: str, inputs: Inputs) -> int:
    """n of the layer, by running the model once."""
    widths: list[int] = []

    def look(module: TailDropout, args: Any, output: Tensor) -> None:
        if isinstance(module, FittedTailDropout):  # zeros come behind its features
            widths.append(module.width)
        else:
            widths.append(output.shape[module.dropout_dim])

    handle = layer.register_forward_hook(look)
    try:
        call(model, inputs)
    finally:
        handle.remove()
    if len(set(widths)) != 1:
        raise ValueError(
            f"layer {name!r} must be called by the model with one number of features, "
            f"got {widths or 'no call'}"
        )
    return widths[0]


@contextmanager
def as_it_was(model: nn.Module, swept: TailDropout) -> Iterator[None]:
    """Eval mode inside, with every layer but `swept` at its k; afterwards all as before."""
    training = {module: module.training for module in model.modules()}
    ks = {layer: layer.k for layer in tail_dropouts(model).values()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for layer, k in ks.items():
                layer.set_k(None if layer is swept else k)
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for layer, k in ks.items():
                layer.set_k(k)


def layer_ks(model: nn.Module, k: int | Mapping[str, int] | None) -> dict[str, int]:
    layers = tail_dropouts(model)
    if not layers:
        raise ValueError("the model must contain a TailDropout layer to be pruned, and has none")
    if k is None:
        given: Mapping[str, Any] = {name: m.k for name, m in layers.items() if m.k is not None}
        if not given:
            raise ValueError("k=None prunes to the ks that are set, and none is: call set_k(k)")
    elif isinstance(k, Mapping):
        given = k
    elif len(layers) == 1:
        given = dict.fromkeys(layers, k)
    else:
        raise ValueError(
            f"the model has several TailDropout layers, give k as a dict: {sorted(layers)}"
        )
    unknown = sorted(set(given) - set(layers))
    if unknown:
        raise ValueError(
            f"k must name TailDropout layers of the model, {sorted(layers)}, got {unknown}"
        )
    ks = {}
    for name, value in given.items():
        value = check_k(value)
        if not isinstance(value, int):
            raise TypeError(f"k must be one int for all samples, got {value} for layer {name!r}")
        if value < 0:
            raise ValueError(f"k must be at least 0, got {value} for layer {name!r}")
        ks[name] = value
    return ks
