"""Sums over features, and products that are no Linear's."""

import torch
from helpers.zoo.case import VECTOR, Case, Weight, columns, linear, module, wired
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout

CASES = {
    "a sum of what is not zero": Case(
        wired(
            lambda m, x: torch.sigmoid(m.tail(m.inner(x))).sum(-1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("sum",),
    ),
    "a number of features that are not zero": Case(
        wired(
            lambda m, x: m.tail(torch.sigmoid(m.inner(x))).norm(0, dim=-1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("linalg_vector_norm",),
    ),
    "a mixture of experts by einsum": Case(
        wired(
            lambda m, x: torch.einsum(
                "beh,eho->bo", m.tail(torch.einsum("bi,eih", x, m.inner.value)), m.out.value
            ),
            inner=lambda: Weight(3, 5, 8),
            tail=TailDropout,
            out=lambda: Weight(3, 8, 2),
        ),
        VECTOR,
        (8,),
        lambda k: {"inner.value": (3, 5, k), "out.value": (3, k, 2)},
        zero=False,
    ),
    "the weight of a Linear, used by itself": Case(  # where a bias would not be added
        wired(
            lambda m, x: F.linear(torch.sigmoid(m.tail(m.inner(x))), m.out.weight),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8, bias=False),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("linear",),
    ),
    "a bilinear form": Case(
        wired(
            lambda m, x: m.out(m.tail(m.inner(x, x)), x),
            inner=lambda: nn.Bilinear(5, 5, 8),
            tail=TailDropout,
            out=lambda: nn.Bilinear(8, 5, 3),
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5, 5) | columns("out", 3, k, 5),
        zero=False,
    ),
    "weight normalisation": Case(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), TailDropout(), nn.Linear(8, 3)
        ),
        VECTOR,
        (8,),
        lambda k: (
            {"0.parametrizations.weight.original0": (k, 1)}
            | {"0.parametrizations.weight.original1": (k, 5), "0.bias": (k,)}
            | columns("2", 3, k)
        ),
        zero=False,
    ),
}
