"""Embeddings and what compares them: similarities, inner products."""

from helpers.zoo.case import (
    VECTOR,
    Case,
    columns,
    in_and_out,
    linear,
    module,
    sequence,
    tokens,
    wired,
)
from torch import nn
from torch.nn import functional as F

from taildropout import TailDropout

CASES = {
    "normalised embeddings": Case(
        wired(
            lambda m, x: m.out(F.normalize(m.tail(m.inner(x)), dim=-1)),
            inner=linear(8, 5),
            tail=TailDropout,
            out=linear(3, 8),
        ),
        VECTOR,
        (8,),
        in_and_out,
        zero=False,
    ),
    "similarities of two towers": Case(
        wired(
            lambda m, x: F.cosine_similarity(
                m.tail(m.inner(x))[:, None], m.tail(m.other(x.square()))[None], dim=-1
            ),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | module("other", k, 5),
        zero=False,
    ),
    "a similarity to a tower without a layer": Case(  # whose norm needs all features
        wired(
            lambda m, x: F.cosine_similarity(m.tail(m.inner(x)), m.other(x), dim=-1),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
        stays=("cosine_similarity",),
    ),
    "an inner product": Case(  # of which either factor's zeros are enough
        wired(
            lambda m, x: (m.tail(m.inner(x)) * m.other(x)).sum(-1),
            inner=linear(8, 5),
            other=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5) | module("other", k, 5),
        zero=False,
    ),
    "a factorisation machine": Case(
        wired(
            lambda m, x: (h := m.tail(m.inner(x))).sum(1).square() - h.square().sum(1),
            inner=linear(8, 5),
            tail=TailDropout,
        ),
        VECTOR,
        (8,),
        lambda k: module("inner", k, 5),
    ),
    "a bag of embeddings": Case(
        sequence(lambda: nn.EmbeddingBag(9, 8, mode="sum"), TailDropout, nn.Sigmoid, linear(3, 8)),
        lambda samples: (tokens(samples, 4, vocabulary=9),),
        (8,),
        lambda k: {"0.weight": (9, k)} | columns("3", 3, k),
        zero=False,
    ),
}
