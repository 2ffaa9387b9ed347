"""Dealing with someone else's model: finding the layers in it, calling it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .layers import TailDropout

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def tail_dropouts(model: nn.Module) -> dict[str, TailDropout]:
    """The model's TailDropout layers by qualified name, in the order of `named_modules()`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), TailDropout(0.2), nn.Linear(8, 2))
        >>> tail_dropouts(model)
        {'1': TailDropout(p=0.2, batch_dim=0, dropout_dim=-1)}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, TailDropout)}


def as_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with: `model(x)`, `model(*inputs)` or `model(**inputs)`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def call(model: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)
