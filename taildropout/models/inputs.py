"""How a model is called, and what its batches hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


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


def pair_of(batch: Any) -> tuple[Inputs, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"data must yield pairs (inputs, target), got {type(batch).__name__}")
    return batch[0], batch[1]


def to_device(values: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return values
    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, values)


def count_samples(inputs: Inputs) -> int:
    sizes = {len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"inputs must be tensors with one number of samples, got {sorted(sizes)} samples"
        )
    return sizes.pop()


def first_samples(inputs: Inputs, count: int) -> Any:
    return tree_map(
        lambda leaf: leaf[:count] if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs
    )


def random_like(value: Any) -> Any:
    """Other values of the same shape and type: Gaussian, or integers that occurred already."""
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, dtype=value.dtype, generator=generator).to(value.device)
    index = torch.randint(max(value.numel(), 1), value.shape, generator=generator)
    return value.flatten()[index.to(value.device)]


def of_twice_the_batch(inputs: Inputs) -> Any:
    """Every tensor along whose first dim the samples lie, twice."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    batch = len(tensors[0]) if tensors else 0

    def twice(value: Any) -> Any:
        has_samples = isinstance(value, Tensor) and value.ndim and len(value) == batch
        return torch.cat([value, value]) if has_samples else value

    return tree_map(twice, inputs)
