"""A whole model nested in one line: a TailDropout wherever a width can be chosen and cut exactly."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..graph.places import Found, Position, Side, find_places
from ..layers import TailDropout
from ..layers.settings import check_multiple_of
from ..lengths import AtLeast, Full, Lengths, LogUniform, Mixed, Sizes
from ..models.copies import structural_copy
from ..models.inputs import Inputs
from ..models.insert import insert, remove, tail_dropouts
from ..models.names import fits_pattern
from ..models.together import DrawnTogether, draw_together
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
    return f" and {count} more" if count > 0 else ""


def _several(more: int) -> str:
    return f"and {more} more modules write" if more > 1 else "and 1 more module writes"


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
        >>> import torch
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
                f"{_several(len(one.positions) - 1)} to these features: with streams=True all of "
                "them get one k"
            )
    found = [one for one in found if fits_pattern(where, one.positions[0].module)]
    stays = _what_stays(model, found, example_inputs)
    for one in [one for one in found if one in stays]:
        found.remove(one)
        others[str(one.positions[0])] = stays[one]
    return Places(tuple(map(_place, found)), others)


@dataclass(frozen=True, eq=False)
class Nested:
    """What `nest` put into a model.

    Attributes:
        layers: the layers by their qualified names.
        places: where they stand.
        draws: what draws them together; its `one_pass()` is for models whose parts are called
            one by one.
    """

    layers: dict[str, TailDropout]
    places: Places
    draws: DrawnTogether
    _model: nn.Module

    def remove(self) -> None:
        """Take the layers out again: the model is what it was."""
        self.draws.remove()
        for name in reversed(self.layers):
            remove(self._model, name)


def nest(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    lengths: Lengths | None = None,
    min_width: float = 1 / 16,
    where: str = "*",
    streams: bool = False,
    multiple_of: int = 1,
) -> Nested:
    """Nest a whole model: in training each sample has one width, at which all of it is narrow.

    In training every sample draws a width, and at each place that `places` finds only the first
    features are kept, as many as the width says. In eval nothing changes, so the model is what it
    was; `at_width(model, 0.25)` runs it at a width, and `prune(model, 0.25, example_inputs)` cuts
    it to one, with nothing left of what the places promise. No parameter is added and no key of
    the state dict changes: checkpoints move in and out.

    Args:
        model: changed in place, by layers and hooks.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample.
        lengths: distribution of k at every place. None: a fifth of the samples at full width, a
            fifth at the smallest, log-uniform between.
        min_width: no sample gets less: the smallest widths cost the others most. A fraction of
            the features, rounded up.
        where: of the names of the modules, with `*`, `?` and `[...]` as in a shell, or "re:...".
        streams: nest residual streams too.
        multiple_of: what hardware likes k to be a multiple of, or as much of it as divides n.
            Where whole heads go, their size comes on top.

    Returns:
        A handle, with the `layers` and `remove()`.

    Raises:
        PruningError: the model can't be exported.
        ValueError: there is no place, and why: the model is nested already, say; `min_width`
            outside (0, 1], `multiple_of` below 1.
        TypeError: `multiple_of` is not an int, or the lengths have no pmf.

    Example:
        >>> import torch
        >>> from taildropout import prune
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> nested = nest(model, torch.randn(2, 8))
        >>> list(nested.layers)
        ['2.tail_dropout']
        >>> prune(model, 0.25, torch.randn(2, 8))[0]
        Linear(in_features=8, out_features=4, bias=True)
        >>> nested.remove()
    """
    if not 0 < min_width <= 1:
        raise ValueError(f"min_width must be a fraction of the features in (0, 1], got {min_width}")
    smallest = float(min_width)
    if lengths is None:
        lengths = Mixed([Full(), LogUniform(smallest), Sizes([smallest])], weights=[0.2, 0.6, 0.2])
    lengths, multiple_of = AtLeast(lengths, smallest), check_multiple_of(multiple_of)
    listed = places(model, example_inputs, where=where, streams=streams)
    coarser = (replace(one, multiple_of=_common(one, multiple_of)) for one in listed)
    found = tuple(one for one in coarser if one.multiple_of < one.n)
    if not found:
        raise ValueError("\n".join([_no_place(model, listed), *_in_words(listed.others)]))
    inserted = {
        layer
        for one in found
        for layer in _insert(model, one.positions, one.multiple_of, lengths=lengths)
    }
    layers = {name: layer for name, layer in tail_dropouts(model).items() if layer in inserted}
    one_row = all(position.one_row for one in found for position in one.positions)
    own_names = "|".join(map(re.escape, layers))
    draws = draw_together(model, f"re:{own_names}", rows=None if one_row else "adjacent")
    return Nested(layers, Places(found, listed.others), draws, model)


def _no_place(model: nn.Module, listed: Places) -> str:
    """What is missing, and what to do where layers stand at the places already."""
    words = "the model must have a place where a width can be chosen, and has none"
    choosing = {
        name: layer
        for name, layer in tail_dropouts(model).items()
        if any(f"layer {name!r} " in reason for reason in listed.others.values())
    }
    if not choosing:
        return words
    names = f"{', '.join(map(repr, list(choosing)[:3]))}{_and_others(len(choosing) - 3)}"
    if all(layer.together is not None for layer in choosing.values()):
        return (
            f"{words} left: it is nested already, by the layers {names}, which at_width, scree and "
            "prune know. To nest it anew, take these out first: call remove() of what nest "
            "returned, or td.remove(model, name) for each"
        )
    return (
        f"{words} left, for its own layers {names} choose the widths already: call "
        "td.draw_together(model) to have them share one, or take them out first"
    )


def _common(place: Place, multiple_of: int) -> int:
    """The multiple of both, or as much of it as divides n."""
    further = multiple_of // math.gcd(place.multiple_of, multiple_of)
    return place.multiple_of * math.gcd(place.n // place.multiple_of, further)


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
    place_of = {
        layer: one for one in found for layer in _insert(copied, one.positions, one.multiple_of)
    }
    owner = {
        name: place_of[layer] for name, layer in tail_dropouts(copied).items() if layer in place_of
    }
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
