"""One file with every width of a nested network, of which a width reads no more than its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measuring.choose import differences
from ..measuring.curve import Scree
from ..models.copies import PruningError, copy_that_shares, tensors_by_name
from ..models.inputs import Inputs
from ..models.insert import tail_dropouts
from ..models.sharded import check_whole_tensors
from ..models.width import at_no_width, check_widths, matched_layers
from ..pruning.configs import fit_configs
from ..pruning.plan import PrunePlan, plan_pruning
from ..pruning.surgery import Tensors, like
from .files import written_whole
from .layout import Assembly, Stored, dtype_of
from .parts import Blocks, Parts, write_parts
from .pruned import SavedPlan
from .sliced import Sliced, name_of, record_of

FORMAT = 1
_KEY = "taildropout_elastic"
_OF_PLAN = ("biases", "fits", "rescales", "to_linears")


def save_elastic(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    menu: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    scree: Scree | None = None,
) -> None:
    """Write a nested model at several widths to one file, of which each device reads its own.

    Each number is stored once: the file holds what the smallest width needs, then what the next one
    adds to it, and so on, and at the end, for each width, what only it has, such as biases that
    took in a constant. So the file is hardly larger than the widest network, and `load_width`
    reads hardly more than a file of `save_pruned` has. Each width is pruned and verified first, as
    by `prune`. The format is safetensors, with a tensor of bytes for each of these parts, and the
    file is written whole or not at all.

    Args:
        model: with TailDropout layers, as `nest` puts them in; it is left untouched.
        example_inputs: a tensor (`model(x)`), a tuple (`model(*inputs)`) or a dict
            (`model(**inputs)`) with at least one sample.
        path: of the file.
        menu: the widths, fractions of the features of all layers. The full width is only there
            if 1.0 is.
        scree: what each width loses, for `describe`: `scree(..., layer="*", ks=menu)`, or at more
            widths.

    Raises:
        PruningError: as in `plan_pruning` and `PrunePlan.apply`.
        ValueError: no TailDropout layer, an empty menu, a width outside (0, 1], a scree that did
            not measure all widths of the menu, or not all layers together.

    Example:
        >>> import tempfile
        >>> from taildropout import nest, prune
        >>> def fresh():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> model, x = fresh(), torch.randn(2, 8)
        >>> _ = nest(model, x)
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_elastic(model, x, path, menu=[0.25, 1.0])
        >>> small = load_width(fresh(), path, 0.25)
        >>> torch.equal(small(x), prune(model, 0.25, x)(x))
        True
    """
    widths = check_widths(menu, "*", "menu")
    measured = None if scree is None else _measured(model, scree, widths)
    plan = plan_pruning(model, widths[-1], example_inputs)
    plans = [plan if width == widths[-1] else plan.at(width) for width in widths]
    sliced = Sliced(model, plans)
    record = {
        "format": FORMAT,
        "model": type(model).__name__,
        "menu": widths,
        **record_of(sliced),
        "widths": [_record(plan, own) for plan, own in zip(plans, sliced.own, strict=True)],
        "scree": measured,
    }
    parts: dict[str, Blocks] = {}
    for i, width in enumerate(widths):
        parts[_added(width)] = partial(sliced.added, i)
    for i, width in enumerate(widths):
        if sliced.own[i]:
            parts[_only_of(width)] = partial(sliced.only_of, i)
    with written_whole(path) as temporary:
        write_parts(temporary, _KEY, record, parts)


def load_width(model: nn.Module, path: str | os.PathLike[str], width: float) -> nn.Module:
    """The network of one width, from a file by `save_elastic`: what `prune` gives at this width.

    Of the file, the header is read, the numbers of this width, which lie one after the other, and
    what only it has; nothing of the wider ones. What is read is compared with its checksums.

    Args:
        model: built as the model that was saved, of full size, with or without the layers of
            `nest`; its weights don't matter. It is left untouched, and the network has its device
            and dtypes. One on the meta device takes no memory; the network is on the CPU then.
        path: a file by `save_elastic`.
        width: one that is on the menu of the file, which `describe` shows.

    Returns:
        The network, in the modes of the model. A model of Hugging Face has a config that builds
        it, as after `PrunePlan.apply`.

    Raises:
        ValueError: the width is not on the menu.
        PruningError: the file is damaged, from a newer version, not by `save_elastic`, or of
            another model, or the model is sharded over processes.
        FileNotFoundError: there is no such file.

    Example: see `save_elastic`.
    """
    check_whole_tensors(model)
    with _opened(path) as file:
        if width not in file.menu:
            raise ValueError(f"width must be one of {file.menu}, the menu of the file, got {width}")
        which = file.menu.index(width)
        file.check_is_of(model)
        saved, tensors = file.plan_at(which), file.tensors_at(which)
    with at_no_width(model):  # a copy would never leave it
        there = tensors_by_name(model)
        small = copy_that_shares(model, [there[cut.name] for cut in saved.cuts])
    try:
        saved.cut(small, tensors)
    except (PruningError, AttributeError, KeyError) as error:
        raise file.of_another(str(error)) from error
    for layer in tail_dropouts(small).values():
        layer.set_k(None)
    _leave_meta(small, tensors)
    small.load_state_dict(tensors)
    fit_configs(small, model)
    return small


@dataclass(frozen=True)
class MenuItem:
    """A width of a file: what it takes and, where a scree was saved, what it loses.

    Attributes:
        width: the fraction of the features.
        parameters: how many the network has.
        bytes: how many `load_width` reads of the file.
        loss: measured mean loss.
        stderr: its standard error.
        difference: how much more it loses than the largest measured width.
        bound: how much more at most, with the confidence of the menu.
    """

    width: float
    parameters: int
    bytes: int
    loss: float | None = None
    stderr: float | None = None
    difference: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Menu:
    """The widths of a file by `save_elastic`. Made by `describe`; `print` shows a table.

    Attributes:
        model: the name of its class.
        items: the widths, the smallest first.
        count: the samples on which they were measured; None without a scree.
        confidence: with which the bounds hold, of all widths at once.
        largest: the width that they are compared with.
    """

    model: str
    items: tuple[MenuItem, ...]
    count: int | None = None
    confidence: float | None = None
    largest: float | None = None

    def __str__(self) -> str:
        rows = [["width", "parameters", "bytes to read"]]
        rows += [[f"{i.width:.6g}", f"{i.parameters:,}", f"{i.bytes:,}"] for i in self.items]
        if self.count is not None:
            rows[0] += ["loss", f"against {self.largest:.6g}", "at most"]
            for row, i in zip(rows[1:], self.items, strict=True):
                row.append(f"{i.loss:.5g} ± {i.stderr:.2g}")
                row += (
                    ["", ""]
                    if i.width == self.largest
                    else [f"{i.difference:+.3g}", f"{i.bound:+.3g}"]
                )
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(size) for cell, size in zip(row, sizes, strict=True)).rstrip()
            for row in rows
        ]
        if self.count is not None and self.confidence is not None:
            lines.append(
                f"loss on {self.count:,} samples, ± its standard error; what is lost at most holds "
                f"with {100 * self.confidence:.6g}% confidence, for all widths at once"
            )
        return "\n".join([f"{self.model}, {len(self.items)} widths", *lines])


def describe(path: str | os.PathLike[str], confidence: float = 0.95) -> Menu:
    """The menu of a file by `save_elastic`, from its header alone.

    Args:
        path: of the file.
        confidence: with which the bounds on what the widths lose hold, all of them at once.

    Raises:
        ValueError: a confidence outside (0, 1), where there is a scree.
        PruningError: as in `load_width`.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> from taildropout import TailDropout
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.Linear(16, 4))
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_elastic(model, torch.randn(2, 8), path, menu=[0.25, 1.0])
        >>> print(describe(path))
        Sequential, 2 widths
        width  parameters  bytes to read
         0.25          56 ...
            1         212 ...
    """
    with _opened(path) as file:
        items = [
            MenuItem(width, int(file.widths[i]["parameters"]), file.bytes_at(i))
            for i, width in enumerate(file.menu)
        ]
        scree = file.scree
    if scree is None:
        return Menu(file.model, tuple(items))
    more, at_most = differences(scree, confidence)
    for i, item in enumerate(items):
        at = scree.ks.index(item.width)
        items[i] = replace(
            item,
            loss=float(scree.loss[at]),
            stderr=float(scree.stderr[at]),
            difference=float(more[at]),
            bound=float(at_most[at]),
        )
    return Menu(file.model, tuple(items), scree.count, confidence, scree.ks[-1])


def _added(width: float) -> str:
    return f"{width} adds"


def _only_of(width: float) -> str:
    return f"only of {width}"


def _record(plan: PrunePlan, own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of one width: what the tensors don't say. What is empty is left out."""
    record = {key: value for key, value in plan.to_dict().items() if key in _OF_PLAN and value}
    if own:
        record["own"] = {n: [name_of(t.dtype), list(t.shape)] for n, t in own.items()}
    return {"parameters": plan.after.parameters, **record}


def _measured(model: nn.Module, scree: Scree, widths: Sequence[float]) -> dict[str, Any]:
    """The scree at the widths, and at the largest that was measured, with which they compare."""
    if scree.features != "first":
        raise ValueError(
            "networks are cut to their first features: the scree must be one with "
            f'features="first", got {scree.features!r}'
        )
    if any(isinstance(k, int) for k in scree.ks) or (
        set(matched_layers(model, scree.layer)) != set(tail_dropouts(model))
    ):
        raise ValueError(
            f'the scree must be one of all layers together, layer="*", got one of {scree.layer!r}'
        )
    missing = [width for width in widths if width not in scree.ks]
    if missing:
        raise ValueError(
            f"the scree must have measured each width of the menu, got none at {missing}: measure "
            f'with layer="*", ks={widths}'
        )
    at = [i for i, width in enumerate(scree.ks) if width in widths or width == scree.ks[-1]]
    ks = [float(scree.ks[i]) for i in at]
    few = Scree(scree.layer, ks, scree.loss[at], scree.count, scree.cov[at][:, at])
    differences(few)  # complains about what can't be compared
    return few.to_dict()


def _leave_meta(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Give tensors without numbers a place on the CPU, where some will be loaded into them."""
    tensors = Tensors(model)
    new: dict[int, Tensor] = {}  # a tied one stays tied
    for name, tensor in list(tensors.by_name.items()):
        if tensor.is_meta:
            if name not in loaded:
                raise PruningError(
                    f"{name!r} of the model is on the meta device, and is not in the state dict, "
                    "which is all that the file holds: build the model on the CPU"
                )
            if id(tensor) not in new:
                new[id(tensor)] = like(torch.empty_like(tensor, device="cpu"), tensor)
            tensors.set(name, new[id(tensor)])


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator["_File"]:
    with Path(path).open("rb", buffering=0) as raw:
        yield _File(os.fspath(path), Parts(raw, _KEY, "save_elastic"))


class _File:
    """What the header of a file says, and how the rest is read.

    Attributes:
        model: the name of the class of the model.
        menu: its widths.
        widths: what is known of each.
        tensors: those that widths are slices of, by name.
        tied: further names of them.
        scree: what the widths lose; None where it is not known.
    """

    def __init__(self, path: str, parts: Parts) -> None:
        self._path, self._parts, record = path, parts, parts.record
        if record.get("format", 0) > FORMAT:
            raise PruningError(
                f"{path!r} has format {record['format']}, and this version of taildropout reads up "
                f"to {FORMAT}: update taildropout"
            )
        try:
            self.model = str(record["model"])
            self.menu = [float(width) for width in record["menu"]]
            empty: dict[str, Any] = {"own": {}, **{key: [] for key in _OF_PLAN}}
            self.widths = [{**empty, **width} for width in record["widths"]]
            self.tied = dict(record["tied"])
            self.tensors = {
                name: Stored.of(stored, record["kept"], len(self.menu))
                for name, stored in record["tensors"].items()
            }
            data = record["scree"]
            self.scree = None if data is None else Scree.from_dict(data)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise parts.damaged(repr(error)) from error

    def bytes_at(self, which: int) -> int:
        """How many a width reads, the header with them."""
        parts = [*map(_added, self.menu[: which + 1])]
        parts += [_only_of(self.menu[which])] if self.widths[which]["own"] else []
        size: int = self._parts.bytes_of_header + sum(map(self._parts.size, parts))
        return size

    def of_another(self, why: str) -> PruningError:
        return PruningError(f"{self._path!r} is of another model than this one: {why}")

    def check_is_of(self, model: nn.Module) -> None:
        """
        Raises:
            PruningError: the model has another class, or tensors of other names or shapes.
        """
        if type(model).__name__ != self.model:
            raise self.of_another(f"it is of a {self.model}, got a {type(model).__name__}")
        expected = {name: stored.shape for name, stored in self._by_name().items()}
        state = model.state_dict()
        found = {
            name: tuple(tensor.shape)
            for name, tensor in {**tensors_by_name(model), **state}.items()
            if name in state or name in expected
        }
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise self.of_another(
                    f"its {name!r} has shape {expected.get(name)}, and the model has one of "
                    f"{found.get(name)}"
                )

    def plan_at(self, which: int) -> SavedPlan:
        cuts = [c for name, stored in self._by_name().items() for c in stored.cuts_at(name, which)]
        return SavedPlan.of(self.widths[which], cuts)

    def _by_name(self) -> dict[str, Stored]:
        return {**self.tensors, **{name: self.tensors[one] for name, one in self.tied.items()}}

    def tensors_at(self, which: int) -> dict[str, Tensor]:
        """What the network of a width has, by name.

        Raises:
            PruningError: they are not those that were written.
        """
        assembly = Assembly(self.tensors, which)
        for i in range(which + 1):
            with self._parts.reading(_added(self.menu[i])) as following:
                assembly.take(i, following)
        tensors = assembly.finish()
        tensors |= {name: tensors[one] for name, one in self.tied.items() if one in tensors}
        if own := self.widths[which]["own"]:
            with self._parts.reading(_only_of(self.menu[which])) as following:
                tensors |= {
                    n: following(shape, dtype_of(dtype)) for n, (dtype, shape) in own.items()
                }
        return tensors
