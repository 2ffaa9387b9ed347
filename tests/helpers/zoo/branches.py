"""Concatenations, residual branches, sums, tied weights: several readers, several writers."""

import torch
from helpers.zoo.case import (
    ANY,
    IMAGE,
    VECTOR,
    Case,
    batch_norm,
    channels,
    columns,
    conv,
    image,
    in_and_out,
    linear,
    module,
    open_,
    sequence,
    tokens,
    wired,
)
from torch import nn

from taildropout import TailDropout


class Tied(nn.Module):
    """An embedding whose table computes the output too, of what stands between."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.between = between
        self.output = nn.Linear(8, 9, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.output(self.between(self.embedding(words)))


CASES = {
    "concatenation": Case(
        wired(
            lambda m, x: m.out(torch.cat([m.left(x), m.tail(m.inner(x)).relu(), m.right(x)], -1)),
            left=linear(3, 5),
            inner=linear(8, 5),
            right=linear(4, 5),
            tail=TailDropout,
            out=linear(3, 15),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | columns("out", 3, 7 + k),
        zero=False,
    ),
    "concatenation of constants": Case(
        wired(
            lambda m, x: m.out(m.norm(torch.cat([m.tail(m.inner(x)).sigmoid(), m.right(x)], -1))),
            inner=linear(8, 5),
            right=linear(4, 5),
            tail=TailDropout,
            norm=lambda: nn.BatchNorm1d(12),
            out=linear(3, 12),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | batch_norm("norm", k + 4) | columns("out", 3, k + 4),
        zero=False,
    ),
    "the layer behind a concatenation": Case(
        wired(
            lambda m, x: m.out(m.tail(torch.cat([m.left(x), m.right(x)], dim=-1))),
            left=linear(3, 5),
            right=linear(5, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: (
            (module("left", k, 5) if k < 3 else {})
            | module("right", max(k - 3, 1), 5)
            | columns("out", 3, k)
        ),
        zero=False,
    ),
    "concatenation of channels": Case(
        wired(
            lambda m, x: m.out(torch.cat([x, m.tail(m.inner(x)), x], dim=1)),
            inner=conv(8, 2, padding=1),
            tail=channels,
            out=conv(3, 12),
        ),
        IMAGE,
        (8,),
        lambda k: module("inner", k, 2, 3, 3) | columns("out", 3, 4 + k, 3, 3),
        zero=False,
    ),
    "residual branch": Case(
        wired(
            lambda m, x: m.out(x + m.tail(m.inner(x))),
            inner=linear(8, 8),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        image(8),
        (8,),
        lambda k: module("inner", k, 8),
        stays=("out",),
    ),
    "residual stream": Case(
        wired(
            lambda m, x: m.out(m.tail((h := m.first(x)) + m.inner(h))),
            first=linear(8, 5),
            inner=linear(8, 8),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: columns("out", 3, k) | open_("inner"),
        stays=("inner",),
    ),
    "a sum of two producers": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x) + m.other(x.tanh()))),
            inner=linear(8, 5),
            other=linear(8, 5, bias=False),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: in_and_out(k) | module("other", k, 5, bias=False),
    ),
    "a sum of two layers": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x)) + m.tail2(m.other(x))),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
            tail2=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8, 8),
        lambda a, b: module("inner", a, 5) | module("other", b, 5) | {"out.weight": ANY},
    ),
    "several consumers": Case(
        wired(
            lambda m, x: (m.out((h := m.tail(m.inner(x))).relu()), m.other(h.sigmoid())),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
            other=linear(4, 8),
        ),
        VECTOR,
        (8,),
        lambda k: in_and_out(k) | columns("other", 4, k),
    ),
    "a consumer that is called twice": Case(
        wired(
            lambda m, x: m.out((h := m.tail(m.inner(x))).relu()) * m.out(h.tanh()),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
    ),
    "a consumer that reads something else too": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x))) * m.out(m.other(x)),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("out",),
    ),
    "features that are read past the layer": Case(
        wired(
            lambda m, x: m.out(m.tail(h := m.inner(x))) * m.other(h),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
            other=linear(3, 8),
        ),
        VECTOR,
        (8,),
        lambda k: columns("out", 3, k),
        stays=("other",),
    ),
    "features that are the output": Case(
        sequence(linear(8, 5), TailDropout),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("output",),
    ),
    "inputs as features": Case(
        sequence(TailDropout, linear(3, 5)),
        VECTOR,
        (5,),
        lambda k: columns("1", 3, k),
        stays=("input",),
    ),
    "several layers": Case(
        sequence(
            linear(8, 5), nn.GELU, TailDropout, linear(6, 8), nn.Sigmoid, TailDropout, linear(4, 6)
        ),
        VECTOR,
        (8, 6),
        lambda a, b: module("0", a, 5) | module("3", b, a) | columns("6", 4, b),
    ),
    "tied weights that lose the same features": Case(
        lambda: Tied(TailDropout()),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: {"embedding.weight": (9, k), "output.weight": (9, k)},
        zero=False,
    ),
    "tied weights that can't agree": Case(
        lambda: Tied(nn.Sequential(TailDropout(), nn.Linear(8, 8))),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: columns("between.1", 8, k),
        stays=("output",),
    ),
}
