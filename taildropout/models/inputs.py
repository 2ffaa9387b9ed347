"""How a model is called, and what its batches hold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with: `model(x)`, `model(*inputs)` or `model(**inputs)`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model makes of the inputs."""
    args, kwargs = as_arguments(inputs)
    return model(*args, **kwargs)


def copied(inputs: Inputs) -> Any:
    """With tensors of its own: a model may change its inputs in place."""
    return tree_map_only(Tensor, Tensor.clone, inputs)


@contextmanager
def leaving_no_trace(model: nn.Module, inputs: Inputs) -> Iterator[Any]:
    """Copies of the inputs, to call the model with inside; afterwards torch's random numbers are
    as before, and no gradient is recorded."""
    with torch.random.fork_rng(devices=cuda_devices(model)), torch.no_grad():
        yield copied(inputs)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Those whose random numbers the model draws, beside those of the CPU."""
    return list({tensor.device for tensor in model.parameters() if tensor.is_cuda})


def pair_of(batch: Any) -> tuple[Inputs, Any]:
    """Inputs and target; anything that is no pair is refused."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"data must yield pairs (inputs, target), got {type(batch).__name__}")
    return batch[0], batch[1]


def inputs_of(batch: Any) -> Inputs:
    """Of a pair, the inputs without the target; a tuple or list of two is a pair."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    inputs: Inputs = batch[0] if is_pair else batch
    return inputs


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def to_device(values: Any, device: torch.device | str | None) -> Any:
    """All that can be moved, on the device; None leaves it where it is."""
    if device is None:
        return values
    return tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, values)


# --- samples, which lie along the first dim of each tensor that has dims ----------------------


def count_samples(inputs: Inputs) -> int:
    """How many there are; tensors that disagree, or have none, are refused."""
    sizes = {len(tensor) for tensor in tensors_of(inputs) if tensor.ndim}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"inputs must be tensors with one number of samples, got {sorted(sizes)} samples"
        )
    return sizes.pop()


def first_samples(inputs: Inputs, count: int) -> Any:
    """The first `count` of them, or all if there are fewer."""
    return tree_map_only(Tensor, lambda x: x[:count] if x.ndim else x, inputs)


def repeat_first_sample(inputs: Inputs, count: int) -> Any:
    """The first of them, `count` times."""
    return tree_map_only(
        Tensor, lambda x: x[:1].expand(count, *x.shape[1:]) if x.ndim else x, inputs
    )


def of_twice_the_batch(inputs: Inputs) -> Any:
    """Every tensor with as many samples as the first, twice."""
    tensors = [tensor for tensor in tensors_of(inputs) if tensor.ndim]
    batch = len(tensors[0]) if tensors else 0
    return tree_map_only(
        Tensor, lambda x: torch.cat([x, x]) if x.ndim and len(x) == batch else x, inputs
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
