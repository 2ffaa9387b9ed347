"""Where the tail of a layer arrives: what a model could return less of."""

from collections.abc import Callable

import torch
from torch import Tensor

from .dataflow import Dataflow, Operation, count_of, layer_dim
from .exports import LAYER
from .relations import Place, Relation, Saying


def find_tails(
    flow: Dataflow, say: Callable[[Operation], tuple[Saying, ...]], ks: dict[str, int]
) -> dict[Place, Tensor]:
    """The features that come from the tail of a layer, at each place that its features arrive at.

    A feature of a sum comes from the tail if one of its summands does. One that holds several, as
    a channel of what was flat holds positions, does if all of them do.
    """
    tails: dict[Place, Tensor] = {}
    for operation in flow.operations.values():
        for relation in say(operation):
            if not isinstance(relation, Relation):
                continue
            for source, labels, place, there in relation.passes(operation.output):
                if source in tails and place[0] is operation.output:
                    _add(tails, place, _passed(tails[source], labels, there))
        if operation.target is LAYER and operation.args[1] in ks:
            place = (operation.output, layer_dim(operation))
            _add(tails, place, torch.arange(count_of(place) or 0) >= ks[operation.args[1]])
    return tails


def _add(tails: dict[Place, Tensor], place: Place, tail: Tensor) -> None:
    tails[place] = tails[place] | tail if place in tails else tail


def _passed(tail: Tensor, labels: Tensor, there: Tensor) -> Tensor:
    """The features with labels `there` that only features of the tail have too."""
    size = 1 + int(torch.cat([labels, there, torch.zeros(1).long()]).max())
    of_tail = torch.zeros(1 + size, dtype=torch.bool)
    of_prefix = torch.zeros_like(of_tail)
    of_tail[labels[tail] + 1] = True
    of_prefix[labels[~tail] + 1] = True
    of_prefix[0] = True  # the label of what belongs to nothing
    return of_tail[there + 1] & ~of_prefix[there + 1]
