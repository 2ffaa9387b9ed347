"""Elementwise functions with parameters, gates, copies and fillings."""

import torch
from helpers.zoo.case import (
    SEQUENCE,
    VECTOR,
    Case,
    Shapes,
    Wired,
    columns,
    in_and_out,
    linear,
    module,
    open_,
    sequence,
    wired,
)
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout


class Scale(nn.Module):
    """The product with one parameter per feature, as ConvNeXt's and CaiT's LayerScale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * x


def swiglu(m: Wired, x: torch.Tensor) -> torch.Tensor:
    gate, value = m.both(x).chunk(2, dim=-1)
    return m.out(m.tail(F.silu(gate) * value))


def swiglu_by_split(m: Wired, x: torch.Tensor) -> torch.Tensor:
    both = m.both(x)
    gate, value = both.split(both.shape[-1] // 2, dim=-1)
    return m.out(m.tail(F.silu(gate) * value))


def swiglu_by_index(m: Wired, x: torch.Tensor) -> torch.Tensor:
    both = m.both(x)
    half = both.shape[-1] // 2
    return m.out(m.tail(F.silu(both[..., :half]) * both[..., half:]))


def tail_on_the_gate(m: Wired, x: torch.Tensor) -> torch.Tensor:
    gate, value = m.both(x).chunk(2, dim=-1)
    return m.out(m.tail(F.silu(gate)) * value)


def two_halves(k: int) -> Shapes:
    return module("both", 2 * k, 5) | columns("out", 3, k)


CASES = {
    "PReLU": Case(
        sequence(
            linear(8, 5),
            lambda: nn.PReLU(8),
            TailDropout,
            lambda: nn.PReLU(8),
            nn.PReLU,
            linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | {"1.weight": (k,), "3.weight": (k,)} | columns("5", 3, k),
        zero=False,
    ),
    "LayerScale": Case(
        sequence(
            linear(8, 5), lambda: Scale(8), TailDropout, lambda: Scale(8), nn.Sigmoid, linear(3, 8)
        ),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | {"1.gamma": (k,), "3.gamma": (k,)} | columns("5", 3, k),
    ),
    "SwiGLU by chunk": Case(
        wired(swiglu, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "SwiGLU by split": Case(
        wired(swiglu_by_split, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "SwiGLU by index": Case(  # the numbers in the code might be written there
        wired(swiglu_by_index, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        lambda k: columns("out", 3, k),
        stays=("slice",),
        zero=False,
    ),
    "SwiGLU, the layer on the gate": Case(
        wired(tail_on_the_gate, both=linear(16, 5), tail=TailDropout, out=linear(3, 8)),
        SEQUENCE,
        (8,),
        two_halves,
        zero=False,
    ),
    "GLU": Case(
        sequence(linear(16, 5), nn.GLU, TailDropout, linear(3, 8)),
        SEQUENCE,
        (8,),
        lambda k: module("0", 2 * k, 5) | columns("3", 3, k),
        zero=False,
    ),
    "the layer before a chunk": Case(  # the tail is the end of the second half
        wired(
            lambda m, x: m.out(torch.mul(*m.tail(m.inner(x)).chunk(2, dim=-1))),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 4),
        ),
        VECTOR,
        (8,),
        lambda k: open_("inner", "out"),
        prefix=False,
    ),
    "one gate for all features": Case(
        wired(
            lambda m, x: m.out((h := m.tail(m.inner(x))) * m.gate(x).expand_as(h)),
            inner=linear(8, 5),
            gate=linear(1, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
        zero=False,
    ),
    "filled with a number": Case(
        wired(
            lambda m, x: m.out(torch.where((h := m.tail(m.inner(x))) > 0, h, torch.ones_like(h))),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
    ),
}
