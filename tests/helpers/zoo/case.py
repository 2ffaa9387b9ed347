"""A network to prune, and what is left of it, worked out by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import taildropout as td
from taildropout import TailDropout

Shapes = dict[str, tuple[int, ...] | None]
ANY = None  # a shape that is not stated


@dataclass(frozen=True)
class Case:
    """A network, and what becomes of it.

    Attributes:
        build: makes the model, its layers in place; call `make` for random weights in float64.
        inputs: random arguments for a number of samples.
        n: the width of each layer, in the order of `td.tail_dropouts`.
        shapes: from the k of each layer to the shape of every tensor that is smaller then. What
            is not named keeps its shape; `ANY` leaves it open.
        stays: for each record of what stays, a word that its name or reason must hold.
        zero: whether at k = 0 no feature is left of anything; else one is kept, for torch has no
            convolution over no channels.
        prefix: whether what is left of each layer is a prefix of its features.
        long: whether it is another one of many alike, for `make long` only.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    n: tuple[int, ...]
    shapes: Callable[..., Shapes]
    stays: tuple[str, ...] = ()
    zero: bool = True
    prefix: bool = True
    long: bool = False

    def make(self) -> nn.Module:
        return with_random_weights(self.build()).double().eval()

    def ks(self, place: str) -> dict[str, int]:
        """A k for each layer. With several layers each stands at another place."""
        places = ["one", "half", "all but one", "all"]
        if place == "none":
            chosen = [0 for _ in self.n]
        else:
            at = places.index(place)
            chosen = [
                {"one": 1, "half": n // 2, "all but one": n - 1, "all": n}[
                    places[(at + i) % 3] if at < 3 else "all"
                ]
                for i, n in enumerate(self.n)
            ]
        return dict(zip(td.tail_dropouts(self.build()), chosen, strict=True))


@torch.no_grad()
def with_random_weights(model: nn.Module) -> nn.Module:
    """No parameter or statistic is at its initial 0 or 1, and no activation is driven to its end."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.normal_(std=fan_in**-0.5)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(vocabulary, shape)


def image(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda samples: (floats(samples, *shape),)


def words(samples: int) -> tuple[torch.Tensor, ...]:
    return (tokens(samples, 7),)


VECTOR, SEQUENCE, IMAGE = image(5), image(4, 5), image(2, 7, 7)


# ------------------------------------------------------------------------------ shapes, for short


def module(name: str, rows: int, *rest: int, bias: bool = True) -> Shapes:
    """The parameters of a Linear or Conv."""
    result: Shapes = {f"{name}.weight": (rows, *rest)}
    return result | ({f"{name}.bias": (rows,)} if bias else {})


def columns(name: str, rows: int, *rest: int) -> Shapes:
    """The weight of a Linear or Conv that keeps its rows."""
    return {f"{name}.weight": (rows, *rest)}


def batch_norm(name: str, k: int) -> Shapes:
    return {
        f"{name}.{tensor}": (k,) for tensor in ("weight", "bias", "running_mean", "running_var")
    }


def open_(*modules: str) -> Shapes:
    return {f"{name}.{tensor}": ANY for name in modules for tensor in ("weight", "bias")}


def in_and_out(k: int) -> Shapes:
    """The shapes of `inner` and `out`."""
    return module("inner", k, 5) | columns("out", 3, k)


# ---------------------------------------------------------------------------- networks, for short


def insert(model: nn.Module, names: list[str], **options: Any) -> nn.Module:
    for name in names:
        td.insert(model, name, TailDropout(0.5, **options))
    return model


def sequence(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in makers))


def linear(rows: int, cols: int, bias: bool = True) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(cols, rows, bias)


def conv(rows: int, cols: int, size: int = 3, **options: Any) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(cols, rows, size, **options)


def channels() -> TailDropout:
    return TailDropout(dropout_dim=1)


class Wired(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in modules.items():
            self.add_module(name, child)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def wired(function: Callable[..., Any], **modules: Callable[[], nn.Module]) -> Callable[[], Wired]:
    return lambda: Wired(function, **{name: make() for name, make in modules.items()})


class Weight(nn.Module):
    """A parameter without a module that uses it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(shape))
