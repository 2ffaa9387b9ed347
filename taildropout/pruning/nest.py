"""A whole model nested in one line: a TailDropout wherever a width can be chosen and cut exactly."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..graph.places import Found, Position, Side, find_places
from ..layers import TailDropout
from ..models.copies import structural_copy
from ..models.inputs import Inputs
from ..models.insert import insert, tail_dropouts
from ..models.names import fits_pattern
from .cuts import Reading
from .predicted import cut_as_predicted


@dataclass(frozen=True)
class Place:
    """Features of which the first k can be kept and the others cut, in front of it and behind it.

    Attributes:
        name: the module at which a TailDropout stands for that.
        at: whether it stands at its "input" or its "output".
        n: how many features there are.
        multiple_of: every k is a multiple of it: of the size of a head, times the queries that
            share its keys and values.
        kind: "hidden", "channels", "heads", "embedding", or "stream": what several modules write
            to and read from.
        parameters: how many go at the smallest k.
        positions: where TailDropouts stand: one, or several that share one k, as for a stream.
    """

    name: str
    at: Side
    n: int
    multiple_of: int
    kind: str
    parameters: int
    positions: tuple[Position, ...]


@dataclass(frozen=True, repr=False)
class Places(Sequence[Place]):
    """The places of a model, in the order of computation; printed, they are a table.

    Attributes:
        others: where no width can be chosen, and why, by "input of NAME" or "output of NAME".
    """

    found: tuple[Place, ...]
    others: dict[str, str]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def __repr__(self) -> str:
        rows = [("module", "at", "kind", "features", "multiple of", "parameters")]
        rows += [
            (
                place.name + _and_others(len(place.positions) - 1),
                place.at,
                place.kind,
                f"{place.n:,}",
                f"{place.multiple_of:,}",
                f"{place.parameters:,}",
            )
            for place in self.found
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, *_in_words(self.others)])


def _and_others(count: int) -> str:
    return f" and {count} more" if count else ""


def _in_words(others: dict[str, str]) -> Iterator[str]:
    """One line for what is alike but for numbers, as the blocks of a transformer are."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in others.items():
        kind = re.sub(r"\d+", "", name), re.sub(r"\d+", "", reason)
        alike.setdefault(kind, []).append(name)
    for names in alike.values():
        yield f"not the {names[0]}{_and_others(len(names) - 1)}: {others[names[0]]}"


def places(
    model: nn.Module, example_inputs: Inputs, *, where: str = "*", streams: bool = False
) -> Places:
    """Where a width can be chosen in a model, and cut exactly on both sides.

    A place is what the dataflow proves to be one, whatever the classes of the modules: a
    TailDropout there, at any k that is a multiple of `multiple_of`, is pruned with nothing left of
    its tail, neither in front of it nor behind. These are the hidden features of MLPs, gated ones
    too, bottlenecks, channels inside of blocks, and heads of attention. The residual stream of
    networks with RMSNorm, or with BatchNorm, is one place with several layers, which share one k.

    Args:
        model: in any mode; it is left untouched, and analysed in eval mode.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample.
        where: of the names of the modules, with `*`, `?` and `[...]` as in a shell, or "re:...".
        streams: list residual streams too.

    Returns:
        The places in the order of computation; `others` says why there is none elsewhere.

    Raises:
        PruningError: the model can't be exported.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> places(model, torch.randn(2, 8))
        module  at     kind    features  multiple of  parameters
        2       input  hidden  16        1            195
        not the input of 0: the input 'input' of the model comes from outside
        not the output of 2: the output of the model must keep its shape
    """
    found, others = find_places(model, example_inputs)
    if not streams:
        for one in [one for one in found if one.kind == "stream"]:
            found.remove(one)
            others[str(one.positions[0])] = (
                f"and {len(one.positions) - 1} more modules write to these features: with "
                "streams=True all of them get one k"
            )
    found = [one for one in found if fits_pattern(where, one.positions[0].module)]
    stays = _what_stays(model, found, example_inputs)
    for one in [one for one in found if one in stays]:
        found.remove(one)
        others[str(one.positions[0])] = stays[one]
    return Places(tuple(map(_place, found)), others)


def _place(found: Found) -> Place:
    first = found.positions[0]
    return Place(
        first.module,
        first.at,
        found.n,
        found.multiple_of,
        found.kind,
        found.parameters,
        found.positions,
    )


def _what_stays(model: nn.Module, found: list[Found], example_inputs: Inputs) -> dict[Found, str]:
    """What the model's code does not let go, for it holds sizes as numbers: seen once it is cut."""
    if not found:
        return {}
    copied = structural_copy(model)
    owner: dict[str, Found] = {}
    for one in found:
        for layer in _insert(copied, one.positions, one.multiple_of):
            owner |= {name: one for name, own in tail_dropouts(copied).items() if own is layer}
    ks = {name: one.multiple_of * (one.groups // 2) for name, one in owner.items()}
    findings, _ = cut_as_predicted(copied, ks, Reading(copied, example_inputs))
    stays: dict[Found, str] = {}
    for stay in findings.stays:
        stays.setdefault(owner[stay.layer], f"{stay.name} {stay.reason}")
    return stays


def _insert(
    model: nn.Module, positions: Sequence[Position], multiple_of: int, **options: Any
) -> Iterator[TailDropout]:
    for position in positions:
        layer = TailDropout(
            batch_dim=position.batch_dim,
            dropout_dim=position.dropout_dim,
            multiple_of=multiple_of,
            **options,
        )
        yield insert(model, position.module, layer, position.at)
