"""What operations say of features: which of which values go or stay together."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .dataflow import Operation, count_of

Place = tuple[fx.Node, int]  # a dim of a value, along which its features lie


@dataclass(frozen=True)
class Part:
    """Features at `place` in a relation: what has the same label belongs together.

    A label of -1 belongs to nothing: the operation leaves this feature free to go or to stay.
    """

    place: Place
    labels: Tensor  # int64, (features at `place`,)
    labels_of_whole: Tensor  # int64, (features at the relation's whole,)


@dataclass(frozen=True, eq=False)
class Relation:
    """A feature of the whole is there if, and only if, it is there in each of the parts.

    Mostly there is one part, and the features correspond one by one. Where a reshape merges
    channels and positions into features, these are the parts.
    """

    whole: Place
    parts: tuple[Part, ...]

    @property
    def places(self) -> list[Place]:
        return [self.whole, *(part.place for part in self.parts)]

    def passes(self, output: fx.Node) -> Iterator[tuple[Place, Tensor, Place, Tensor]]:
        """From a place of a source to one of the output, with their labels."""
        for part in self.parts:
            if self.whole[0] is output:
                yield part.place, part.labels, self.whole, part.labels_of_whole
            else:
                yield self.whole, part.labels_of_whole, part.place, part.labels


@dataclass(frozen=True, eq=False)
class Read:
    """Features at `place` are multiplied by the entries of `weight`, if there is one, and summed.

    Where they are constant they can go, together with these entries; their sum is added to `bias`.
    """

    operation: Operation
    place: Place
    weight: Place | None = None
    bias: Any = None  # a value, or None where there is none

    @cached_property
    def tie(self) -> Relation:
        """Features and entries go together."""
        if self.weight is None:
            return Relation(self.place, ())
        (tie,) = same(self.place, self.weight)
        return tie


@dataclass(frozen=True)
class Made:
    """Features at a place of the output that the operation makes by itself, whatever it reads."""

    place: Place
    features: Tensor  # bool, (features at `place`,)


Saying = Relation | Read | Made


def related(place: Place, whole: Place, labels: Tensor, labels_of_whole: Tensor) -> Relation:
    return Relation(whole, (Part(place, labels, labels_of_whole),))


def same(place: Place, whole: Place) -> Iterator[Relation]:
    """One by one. Nothing where the number of features is no fixed one, or is another."""
    n = count_of(place)
    if n is not None and n == count_of(whole):
        index = torch.arange(n)
        yield related(place, whole, index, index)


def dims_alike(
    source: fx.Node, output: fx.Node, dims: Mapping[int, int] | Iterable[int]
) -> Iterator[Relation]:
    """Dims of the source that the output has too, and where there."""
    pairs = dims.items() if isinstance(dims, Mapping) else [(d, d) for d in dims]
    for dim, out_dim in pairs:
        yield from same((source, dim), (output, out_dim))


def read(
    operation: Operation, place: Place, weight: Place | None = None, bias: Any = None
) -> Iterator[Read]:
    """Nothing where the number of features is no fixed one."""
    n = count_of(place)
    if n is not None and (weight is None or n == count_of(weight)):
        yield Read(operation, place, weight, bias)
