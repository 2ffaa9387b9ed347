"""What networks for sequences consist of: recurrent modules and cells, attention."""

from collections.abc import Callable
from typing import Any

import torch
from helpers.zoo.case import (
    ANY,
    SEQUENCE,
    Case,
    Weight,
    Wired,
    columns,
    linear,
    module,
    sequence,
    wired,
)
from torch import nn

from taildropout import TailDropout


class Output(nn.Module):
    """The first output of a recurrent module."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.recurrent(x)[0]


def recurrent(kind: type[nn.RNNBase], *sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Output(kind(*sizes, batch_first=True, **options))


def step_by_step(m: Wired, x: torch.Tensor) -> torch.Tensor:
    hidden = None
    for values in torch.sigmoid(m.tail(m.inner(x))).unbind(1):
        hidden = m.cell(values, hidden)
    return m.out(hidden[0] if isinstance(hidden, tuple) else hidden)


def heads_by_einsum(m: Wired, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (torch.einsum("btc,hcd->bthd", x, w.value) for w in (m.query, m.key, m.values))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    context = m.tail(torch.einsum("bhij,bjhd->bhid", weights, v))
    return torch.einsum("bhid,hdc->bic", context, m.out.value)


def self_attended(m: Wired, x: torch.Tensor) -> torch.Tensor:
    h = m.tail(m.inner(x))
    return m.out(m.attention(h, h, h, need_weights=False)[0])


def cross_attended(m: Wired, x: torch.Tensor) -> torch.Tensor:
    h = m.tail(m.inner(x))
    return m.out(m.attention(m.query(x), h, h, need_weights=False)[0])


def multihead(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **options)


CASES = {
    **{
        f"{kind.__name__} as producer": Case(
            sequence(recurrent(kind, 5, 8), TailDropout, linear(3, 8)),
            SEQUENCE,
            (8,),
            lambda k: columns("2", 3, k),
            stays=(kind.__name__.lower(),),
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    **{
        f"{kind.__name__} as consumer": Case(
            sequence(linear(8, 5), TailDropout, recurrent(kind, 8, 6), linear(3, 6)),
            SEQUENCE,
            (8,),
            lambda k: module("0", k, 5) | {"2.recurrent.weight_ih_l0": ANY},
            zero=False,
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    **{
        f"{kind.__name__} as consumer": Case(
            wired(
                step_by_step,
                inner=linear(8, 5),
                tail=TailDropout,
                cell=lambda kind=kind: kind(8, 6),
                out=linear(3, 6),
            ),
            SEQUENCE,
            (8,),
            lambda k: module("inner", k, 5) | {"cell.weight_ih": ANY},
            zero=False,
        )
        for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
    },
    "attention heads by einsum": Case(
        wired(
            heads_by_einsum,
            query=lambda: Weight(4, 5, 3),
            key=lambda: Weight(4, 5, 3),
            values=lambda: Weight(4, 5, 3),
            tail=lambda: TailDropout(batch_dim=0, dropout_dim=1),
            out=lambda: Weight(4, 3, 5),
        ),
        SEQUENCE,
        (4,),
        lambda k: (
            {f"{name}.value": (k, 5, 3) for name in ("query", "key", "values")}
            | {"out.value": (k, 3, 5)}
        ),
        zero=False,
    ),
    "self-attention as consumer": Case(
        wired(
            self_attended,
            inner=linear(8, 5),
            tail=TailDropout,
            attention=multihead(),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("attention",),
    ),
    "cross-attention as consumer": Case(
        wired(
            cross_attended,
            inner=linear(6, 5),
            query=linear(8, 5),
            tail=TailDropout,
            attention=multihead(kdim=6, vdim=6),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (6,),
        lambda k: (
            module("inner", k, 5) | {"attention.k_proj_weight": ANY, "attention.v_proj_weight": ANY}
        ),
    ),
    "self-attention as producer": Case(
        wired(
            lambda m, x: m.out(m.tail(m.attention(h := m.inner(x), h, h, need_weights=False)[0])),
            inner=linear(8, 5),
            attention=multihead(),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("attention.out_proj", k, 8) | columns("out", 3, k),
        zero=False,
    ),
    "a transformer's encoder layer": Case(
        wired(
            lambda m, x: m.out(m.encoder(m.tail(m.inner(x)))),
            inner=linear(8, 5),
            tail=TailDropout,
            encoder=lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            out=linear(3, 8),
        ),
        SEQUENCE,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("encoder",),
    ),
}
