"""Operations that only put entries to other places."""

import torch

from .dataflow import Operation, shape
from .relations import Part, Relation, Rules

aten = torch.ops.aten

# Where the value that they fill up with stands among the arguments.
_PADDING_VALUE = {aten.constant_pad_nd.default: 2, aten.pad.default: 3}


def move(operation: Operation, rules: Rules) -> None:
    """Found by moving tensors that hold, at each place, 1 + its number.

    0 stands for what comes from elsewhere.
    """
    output, sources = operation.output, operation.sources
    padding = _PADDING_VALUE.get(operation.target, len(operation.args))
    elsewhere = {padding: 0.0} if padding < len(operation.args) else {}
    nothing = {source: torch.zeros(shape(source), dtype=torch.float64) for source in sources}
    made = [torch.ones(size, dtype=torch.bool) for size in shape(output)]
    related = [False] * len(made)
    for source in sources:
        numbers = torch.arange(1.0, 1 + nothing[source].numel()).double().view(shape(source))
        moved = operation.run({**nothing, source: numbers}, elsewhere).long() - 1
        from_here = moved >= 0
        index = torch.unravel_index(moved.clamp(min=0), shape(source))
        merged: dict[int, list[Part]] = {}  # by dim of the output
        split: dict[int, list[Part]] = {}  # by dim of the source
        for dim, size in enumerate(shape(source)):
            for out_dim, out_size in enumerate(shape(output)):
                along = [-1 if d == out_dim else 1 for d in range(moved.ndim)]
                out_index = torch.arange(out_size).view(along).expand(moved.shape)
                pairs = torch.stack([index[dim][from_here], out_index[from_here]])
                here, there = pairs.unique(dim=1)
                if len(here.unique()) < 2 or len(there.unique()) < 2:
                    continue
                labels, out_labels = torch.full((size,), -1), torch.full((out_size,), -1)
                if len(there.unique()) == len(there):  # the place in the output says which it is
                    labels, out_labels[there] = torch.arange(size), here
                    part = Part((source, dim), labels, out_labels)
                    merged.setdefault(out_dim, []).append(part)
                elif len(here.unique()) == len(here):  # it says where in the output it is
                    labels[here], out_labels = there, torch.arange(out_size)
                    part = Part((output, out_dim), out_labels, labels)
                    split.setdefault(dim, []).append(part)
                else:
                    continue
                related[out_dim] = True
        for out_dim, parts in merged.items():
            rules.relations.append(Relation((output, out_dim), tuple(parts)))
        for dim, parts in split.items():
            rules.relations.append(Relation((source, dim), tuple(parts)))
        followed = {*merged, *(part.place[1] for parts in split.values() for part in parts)}
        for out_dim in range(moved.ndim):
            supplied = from_here.movedim(out_dim, 0).reshape(shape(output)[out_dim], -1).any(1)
            if out_dim in followed:
                made[out_dim] &= ~supplied
        for out_dim in set(range(moved.ndim)) - followed:
            supplied = from_here.movedim(out_dim, 0).reshape(shape(output)[out_dim], -1).any(1)
            made[out_dim] |= supplied
    if operation.target is aten.expand.default:  # however many copies there are
        missing = len(shape(output)) - len(shape(sources[0]))
        once = [d for d in range(len(made)) if d < missing or shape(sources[0])[d - missing] == 1]
        rules.relations += [Relation((output, dim), ()) for dim in once if shape(output)[dim] > 1]
    rules.made += [
        ((output, dim), made[dim]) for dim in range(len(made)) if related[dim] and made[dim].any()
    ]
