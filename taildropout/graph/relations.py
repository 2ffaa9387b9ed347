"""What operations say of features: which of which values go or stay together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .dataflow import Operation, shape

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


@dataclass(frozen=True)
class Read:
    """Features at `place` are multiplied by the entries of `weight`, if there is one, and summed.

    Where they are constant they can go, together with these entries; their sum is added to `bias`.
    """

    operation: Operation
    place: Place
    weight: Place | None = None
    bias: Any = None  # a value, or None where there is none

    @property
    def tie(self) -> Relation:
        """Features and entries go together."""
        return same(self.place, self.weight) if self.weight else Relation(self.place, ())


@dataclass
class Rules:
    """What one operation says.

    `made` are the features at places of its output that it makes by itself: they are there,
    whatever it reads.
    """

    relations: list[Relation]
    reads: list[Read]
    made: list[tuple[Place, Tensor]]


def related(place: Place, whole: Place, labels: Tensor, labels_of_whole: Tensor) -> Relation:
    return Relation(whole, (Part(place, labels, labels_of_whole),))


def same(place: Place, whole: Place) -> Relation:
    """One by one."""
    index = torch.arange(shape(whole[0])[whole[1]])
    return related(place, whole, index, index)
