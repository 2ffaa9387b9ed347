"""Norms in front of the layer, behind it, and along another dim."""

from helpers.zoo.case import (
    IMAGE,
    SEQUENCE,
    VECTOR,
    Case,
    channels,
    columns,
    conv,
    in_and_out,
    linear,
    module,
    open_,
    sequence,
    wired,
)
from torch import nn

from taildropout import TailDropout

CASES = {
    "LayerNorm before": Case(
        sequence(linear(8, 5), lambda: nn.LayerNorm(8), TailDropout, linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: columns("3", 3, k),
        stays=("norm",),
    ),
    "LayerNorm behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.LayerNorm(8), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("norm",),
    ),
    "RMSNorm before": Case(
        sequence(linear(8, 5), lambda: nn.RMSNorm(8), TailDropout, linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: columns("3", 3, k),
        stays=("norm",),
    ),
    "RMSNorm behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.RMSNorm(8), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5) | {"2.weight": (k,)} | columns("3", 3, k),
        zero=False,
    ),
    "GroupNorm before": Case(
        sequence(conv(8, 2), lambda: nn.GroupNorm(2, 8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: columns("3", 3, k, 3, 3) | ({} if k % 4 else open_("0", "1")),
        zero=False,
    ),
    "GroupNorm behind": Case(
        sequence(conv(8, 2), channels, lambda: nn.GroupNorm(2, 8), conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: module("0", k, 2, 3, 3) | ({} if k % 4 else open_("2", "3")),
        zero=False,
    ),
    "GroupNorm of one channel each": Case(
        sequence(conv(8, 2), lambda: nn.GroupNorm(8, 8), channels, conv(3, 8)),
        IMAGE,
        (8,),
        lambda k: columns("3", 3, k, 3, 3) | open_("0", "1"),
        zero=False,
    ),
    "LayerNorm along time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.LayerNorm(4, elementwise_affine=False),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        in_and_out,
        zero=False,
    ),
    "RMSNorm along time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.RMSNorm(4),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        in_and_out,
        zero=False,
    ),
    "LayerNorm along time, a bias for each time": Case(
        wired(
            lambda m, x: m.out(m.norm(m.tail(m.inner(x)).mT).mT),
            inner=linear(8, 5),
            tail=TailDropout,
            norm=lambda: nn.LayerNorm(4),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("out",),
    ),
    "softmax behind": Case(
        sequence(linear(8, 5), TailDropout, lambda: nn.Softmax(-1), linear(3, 8)),
        VECTOR,
        (8,),
        lambda k: module("0", k, 5),
        stays=("softmax",),
    ),
}
