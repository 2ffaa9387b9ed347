"""Which features k are, and what a layer passes of them."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..functional import keep_prefix
from ..functional.linear import factors_of, with_tail_bias
from ..layers import TailDropout, TailLinear
from ..models.hooks import hooked
from ..models.inputs import Inputs, call, pair_of, to_device
from .moments import Moments, of_all_processes
from .vmapped import linear_of_prefix

Features = Literal["first", "random", "principal"]


def check_features(features: str, data: Iterable[Any]) -> None:
    if features not in get_args(Features):
        raise ValueError(f"features must be one of {get_args(Features)}, got {features!r}")
    if features == "principal" and iter(data) is data:
        raise ValueError(
            'features="principal" goes through the data twice, first for the components: pass a '
            f"list or DataLoader, got a {type(data).__name__} that can be gone through once"
        )


class Cut(Protocol):
    """k of n features."""

    def at(self, layer: TailDropout, k: int) -> AbstractContextManager[object]:
        """Inside, the layer keeps them, in plain runs."""
        ...

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        """What is left of the features, in their shape; k has no dims."""
        ...

    def read(self, features: Tensor, k: Tensor, linear: nn.Linear) -> Tensor:
        """What the Linear, or TailLinear, makes of them; under vmap over k a running sum."""
        ...


def keep_some(features: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Zero where `kept`, a bool for each feature along `dim`, is False."""
    behind = features.ndim - 1 - range(features.ndim)[dim]
    return torch.where(kept.view(-1, *[1] * behind), features, features.new_zeros(()))


@dataclass(frozen=True, eq=False)
class First:
    """The first k, as the layer keeps them."""

    dim: int

    def at(self, layer: TailDropout, k: int) -> AbstractContextManager[object]:
        return layer.using_k(k)

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        return keep_prefix(features, k, self.dim)

    def read(self, features: Tensor, k: Tensor, linear: nn.Linear) -> Tensor:
        if not isinstance(linear, TailLinear):
            return linear_of_prefix(features, k, linear.weight, linear.bias)
        output = linear_of_prefix(features, k, linear.weight)
        k = k.to(output.device)
        if linear.scale is not None:
            factor = factors_of(k, features.shape[-1], output.dtype)
            output = (output * factor).to(output.dtype)
        output = output if linear.bias is None else output + linear.bias
        return with_tail_bias(output, k, linear.tail_bias)


@dataclass(frozen=True, eq=False)
class Random:
    """The first k in an order that has nothing to do with them, the same at each k."""

    dim: int
    n: int

    def order(self, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        padding = torch.arange(self.n, size)  # of a layer that was fitted: zeros, which stay behind
        return torch.cat([torch.randperm(self.n, generator=generator), padding])

    def at(self, layer: TailDropout, k: int) -> AbstractContextManager[object]:
        return hooked({layer: lambda module, args, output: self.keep(output, k)})

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        place = self.order(features.shape[self.dim]).argsort().to(features.device)
        k = k.to(features.device) if isinstance(k, Tensor) else k
        return keep_some(features, place < k, self.dim)

    def read(self, features: Tensor, k: Tensor, linear: nn.Linear) -> Tensor:
        order = self.order(features.shape[-1]).to(features.device)
        return linear_of_prefix(features[..., order], k, linear.weight[:, order], linear.bias)


@dataclass(frozen=True, eq=False)
class Principal:
    """The mean, and what the first k principal components have of the rest.

    With the mean m and the eigenvectors V of the features' covariance, by falling eigenvalue, it
    is m + V_k V_k' (x - m): of all affine maps of rank k the one that is closest to the features
    in squared error.

    Source: Pearson, On lines and planes of closest fit to systems of points in space (1901).
    """

    dim: int
    mean: Tensor  # (n,)
    axes: Tensor  # (n, n): a component in each column

    @classmethod
    def of_each(
        cls,
        model: nn.Module,
        layers: Collection[TailDropout],
        data: Iterable[tuple[Inputs, Any]],
        device: torch.device | str | None,
    ) -> "dict[TailDropout, Principal]":
        """Of what each layer passes, over the data of all processes: each place is a sample.

        Layers that the model never calls have none.
        """
        found: dict[TailDropout, Moments] = {}

        def add(layer: TailDropout, args: Any, output: Tensor) -> None:
            features = output.movedim(layer.dropout_dim, 0).flatten(1).double().cpu()
            found.setdefault(layer, Moments(len(features))).add(features)

        with hooked(dict.fromkeys(layers, add)):
            for batch in data:
                call(model, to_device(pair_of(batch)[0], device))
        components = {}
        for layer in layers:
            _, moments = of_all_processes(None, found.get(layer))
            if moments is not None:
                axes = torch.linalg.eigh(moments.squares).eigenvectors.flip(1)
                components[layer] = cls(layer.dropout_dim, moments.mean, axes)
        return components

    def at(self, layer: TailDropout, k: int) -> AbstractContextManager[object]:
        return hooked({layer: lambda module, args, output: self.keep(output, k)})

    def keep(self, features: Tensor, k: int | Tensor) -> Tensor:
        mean, axes = self._like(features)
        codes = (features.movedim(self.dim, -1).to(mean.dtype) - mean) @ axes
        kept = linear_of_prefix(codes, torch.as_tensor(k), axes, mean)
        return kept.movedim(-1, self.dim).to(features.dtype)

    def read(self, features: Tensor, k: Tensor, linear: nn.Linear) -> Tensor:
        mean, axes = self._like(features)
        codes = (features.to(mean.dtype) - mean) @ axes
        weight = linear.weight.to(mean.dtype)
        start = weight @ mean if linear.bias is None else weight @ mean + linear.bias
        return linear_of_prefix(codes, k, weight @ axes, start).to(features.dtype)

    def _like(self, features: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(features.dtype, torch.float32)
        return self.mean.to(features.device, dtype), self.axes.to(features.device, dtype)
