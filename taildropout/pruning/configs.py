"""Configs of Hugging Face models that were cut: what `from_pretrained` builds them from.

Nothing is known of families of models. The fewest numbers in the config are changed such that the
model which is built from it, on the meta device, is the pruned one.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..layers.fitted import FittedTailDropout
from ..models.copies import PruningError, tensors_by_name, with_own_buffers
from ..models.inputs import Inputs
from .verify import difference_of, run

Place: TypeAlias = tuple[str, int | str]
"""A tensor and one of its dims, or a module and an attribute that is a number."""

Path: TypeAlias = tuple[str | int, ...]
"""Of a number in a config: names of nested configs, of the field, an index where it is a list."""

Change: TypeAlias = tuple[Path, Any]
"""A number in a config, and what it becomes."""

# Sets of changes to look at, before none is believed to do.
MOST_TRIES = 1000


class Refusal:
    """Stands for `save_pretrained` of a model that no config builds; it can be pickled."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise PruningError(self.message)


def fit_configs(small: nn.Module, model: nn.Module, inputs: Inputs | None = None) -> None:
    """Give a pruned model a config that builds it; where none does, saving it says why.

    Args:
        small: the model, or what contains it, with its inserted layers. Its configs are replaced
            by copies before they are changed.
        model: what it was before it was cut.
        inputs: what `small` is called with, to compare it with what its config builds.
    """
    for name in _outermost(small):
        part = small.get_submodule(name)
        before, after = Sizes.of(model.get_submodule(name)), Sizes.of(part)
        fitted = [n for n, m in part.named_modules() if isinstance(m, FittedTailDropout)]
        if before == after and not fitted:
            continue
        _forget_refusals(part)
        found: list[Change] | str
        if fitted:
            found = f"its TailDropout layers still slice what arrives or add zeros: {_some(fitted)}"
        else:
            found = _found(part, before, after)
        if isinstance(found, list) and _computes_another(small, name, found, inputs):
            found = "computes something else"
        if isinstance(found, list):
            _change_configs(part, found)
        else:
            _refuse(part, found)


def _outermost(model: nn.Module) -> list[str]:
    """The modules that are saved with a config and stand in no other such module."""
    found: list[str] = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_saved = hasattr(module, "save_pretrained") and hasattr(config, "model_type")
        if is_saved and not any(name.startswith(f"{o}." if o else "") for o in found):
            found.append(name)
    return found


def _refuse(part: nn.Module, reason: str) -> None:
    for module in part.modules():
        if hasattr(module, "save_pretrained"):
            vars(module)["save_pretrained"] = Refusal(
                f"a {type(part).__name__} that is built from its config must be the pruned one to "
                f"be saved by save_pretrained, but {reason}. Or save it with "
                "taildropout.save_pruned(small, plan, path)."
            )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _forget_refusals(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(vars(module).get("save_pretrained"), Refusal):
            del vars(module)["save_pretrained"]


# --- what a model must have in common with the one that is built ------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of a model: the shapes of its tensors by name, and the numbers that its modules hold."""

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[Place, float]

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        numbers = {
            (name, attribute): value
            for name, module in model.named_modules()
            if not isinstance(module, nn.Dropout)  # its p may be changed at any time
            for attribute, value in vars(module).items()
            if type(value) in (int, float)
        }
        return cls(shapes, numbers)

    def dims(self) -> dict[Place, int]:
        return {(name, d): n for name, shape in self.shapes.items() for d, n in enumerate(shape)}

    def places(self) -> dict[Place, float]:
        return {**self.dims(), **self.numbers}


@dataclass(frozen=True)
class Target:
    """What is asked of a config: `base` is what the present one builds, `small` what it should."""

    base: Sizes
    small: Sizes

    @classmethod
    def of(cls, base: Sizes, before: Sizes, after: Sizes) -> "Target":
        """Numbers that the user changed, and surgery did not, are not asked for."""
        numbers = {
            key: value
            for key, value in after.numbers.items()
            if key in base.numbers
            and (value == base.numbers[key] or value != before.numbers.get(key))
        }
        return cls(base, Sizes(after.shapes, numbers))

    def is_met_by(self, built: Sizes) -> bool:
        return built.shapes == self.small.shapes and all(
            built.numbers.get(key) == number
            or (number, built.numbers.get(key)) in self.sizes_in(key[0])
            for key, number in self.small.numbers.items()
        )

    def sizes_in(self, module: str = "") -> set[tuple[int, int]]:
        """The sizes that changed in a module, from and to. It may hold the old one, unused."""
        small = self.small.dims()
        return {
            (size, small[place])
            for place, size in self.base.dims().items()
            if small.get(place, size) != size
            and place[0].startswith(f"{module}." if module else "")
        }

    def changes(self) -> set[tuple[float, float]]:
        """All sizes and numbers that changed, from and to."""
        numbers = {(self.base.numbers[key], value) for key, value in self.small.numbers.items()}
        return self.sizes_in() | {(old, new) for old, new in numbers if old != new}

    def open_places(self) -> set[Place]:
        """The sizes and numbers that must become others."""
        base = self.base.places()
        return {place for place, size in self.small.places().items() if base.get(place) != size}

    def touched_by(self, built: Sizes) -> dict[Place, bool]:
        """The sizes and numbers that `built` has others of, and whether they are as they should."""
        base, small, found = self.base.places(), self.small.places(), built.places()
        return {
            place: found.get(place) == small.get(place)
            for place in base.keys() | found.keys()
            if found.get(place) != base.get(place)
        }


# --- the search -------------------------------------------------------------------------------


def _found(part: Any, before: Sizes, after: Sizes) -> list[Change] | str:
    """The changes with which the config of a model builds it, or why there are none."""
    base = _built(part, [])
    if base is None:
        return "its class can't be built from its config alone"
    if base.shapes.keys() != after.shapes.keys():
        return f"one of them only has {_some(sorted(base.shapes.keys() ^ after.shapes.keys()))}"
    target = Target.of(base, before, after)
    if target.is_met_by(base):
        return []
    for written in ([], _derived_head_dim(part)):
        start = _built(part, written)
        if start is not None and start.shapes == base.shapes:
            for only_equal in (True, False):
                tries = _tries(part, written, target, only_equal)
                for changes in _enough(tries, target):
                    built = _built(part, [*written, *changes])
                    if built is not None and target.is_met_by(built):
                        return [*written, *changes]
    return _why_none(part, target)


def _model_from(part: Any, changes: list[Change]) -> nn.Module:
    """What the changed config builds, on the meta device."""
    config = copy.deepcopy(part.config)
    for path, value in changes:
        _change(config, path, value)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: nn.Module = type(part)(config)
        return model


def _built(part: nn.Module, changes: list[Change]) -> Sizes | None:
    """The sizes of the model that the changed config builds."""
    try:
        return Sizes.of(_model_from(part, changes))
    except Exception:  # the config or the model refuses such numbers
        return None


def _computes_another(
    small: nn.Module, name: str, changes: list[Change], inputs: Inputs | None
) -> bool:
    """Whether the outputs differ with the model that is built, with the same weights, in place."""
    if inputs is None:
        return False
    whole = with_own_buffers(small).eval()
    expected = run(whole, inputs)
    part = whole.get_submodule(name)
    try:
        built = _model_from(part, changes).eval()
        for place, tensor in tensors_by_name(part).items():
            _put(built, place, tensor)
        if name:
            _put(whole, name, built)
        return not difference_of(expected, run(whole if name else built, inputs)).is_rounding
    except PruningError:  # an output of another shape
        return True
    except Exception:  # it holds tensors on the meta device that are no parameters or buffers
        return False


def _put(model: nn.Module, name: str, value: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _derived_head_dim(part: Any) -> list[Change]:
    """The size of a head, where the config leaves it to be derived from the number of heads."""
    found = {
        vars(m)["head_dim"] for m in part.modules() if isinstance(vars(m).get("head_dim"), int)
    }
    written = getattr(part.config, "head_dim", None)
    return [(("head_dim",), found.pop())] if written is None and len(found) == 1 else []


Touched: TypeAlias = dict[Place, bool]
"""The sizes and numbers that a change touches, and whether each is as it should be then."""


def _tries(
    part: Any, written: list[Change], target: Target, only_equal: bool
) -> dict[Change, Touched]:
    """The changes that may be part of the answer, and what each touches by itself."""
    open_places, sizes = target.open_places(), target.base.dims().keys()
    tries = {}
    for path, value in _fields(part.config):
        for new in _proposals(value, target.changes(), only_equal):
            built = _built(part, [*written, (path, new)])
            touched = {} if built is None else target.touched_by(built)
            sizes_touched = {place for place in touched if place in sizes}
            if touched.keys() & open_places and sizes_touched <= open_places:
                tries[path, new] = touched
    return tries


def _enough(tries: dict[Change, Touched], target: Target) -> list[list[Change]]:
    """The sets of changes that may reach all, the smallest first.

    What a single one of them touches must be as it should; of what several touch, it is open.
    """
    reachable = {place for touched in tries.values() for place in touched}
    wanted = sorted(target.open_places() & reachable, key=str)
    found: dict[frozenset[Change], None] = {}
    seen: set[frozenset[Change]] = set()

    def extend(chosen: frozenset[Change]) -> None:
        if chosen in seen or len(seen) > MOST_TRIES:
            return
        seen.add(chosen)
        for place in wanted:
            reached = [tries[change][place] for change in chosen if place in tries[change]]
            if len(reached) < 2 and not any(reached):
                paths = {path for path, _ in chosen}
                for change, touched in tries.items():
                    if place in touched and change[0] not in paths:
                        extend(chosen | {change})
                return
        found[chosen] = None

    extend(frozenset())
    return [list(chosen) for chosen in sorted(found, key=len) if chosen]


def _fields(config: Any, owner: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The numbers of a config, and the fields that are None, which are derived from others."""
    for name in config.to_dict():
        value = getattr(config, name, "")
        if hasattr(value, "to_dict"):
            yield from _fields(value, (*owner, name))
        elif isinstance(value, list | tuple):
            yield from (
                ((*owner, name, i), entry)
                for i, entry in enumerate(value)
                if type(entry) in (int, float)
            )
        elif value is None or type(value) in (int, float):
            yield (*owner, name), value


def _proposals(
    value: float | None, changes: set[tuple[float, float]], only_equal: bool
) -> Iterator[float]:
    """What a field may become: as what it equals; else in proportion, as heads and ratios do."""
    proposed: set[float] = set()
    for old, new in sorted(changes):
        if value == old:
            proposed.add(new)
        elif only_equal or isinstance(old, float) or isinstance(new, float):
            continue
        elif value is None:
            proposed.add(new)
        elif isinstance(value, int) and value > 0:
            if old % value == 0 and new * value % old == 0:
                proposed.add(new * value // old)
        elif value > 0:
            proposed.add(_ratio(old / value, new))
    yield from sorted(proposed - {value})


def _ratio(size: float, new: float) -> float:
    """What `size` is multiplied by to give `new`, also if the product is rounded down."""
    ratio = new / size
    return ratio if int(size * ratio) == new else math.nextafter(ratio, math.inf)


def _change(config: Any, path: Path, value: Any) -> None:
    for name in path:
        inner = getattr(config, str(name), None)
        if not hasattr(inner, "to_dict"):
            break
        config, path = inner, path[1:]
    name, *index = path
    if index:
        entries = list(getattr(config, str(name)))
        entries[int(index[0])] = value
        value = type(getattr(config, str(name)))(entries)
    setattr(config, str(name), value)


def _change_configs(part: Any, changes: list[Change]) -> None:
    """Also the copies of its config that a model's modules may hold, as encoders and decoders."""
    copies: dict[int, Any] = {}  # those that modules share stay shared
    for module in part.modules():
        if hasattr(vars(module).get("config"), "to_dict"):
            module.config = copy.deepcopy(module.config, copies)
    before = part.config.to_dict()
    others = {id(c): c for m in part.modules() if (c := vars(m).get("config")) is not part.config}
    for path, value in changes:
        _change(part.config, path, value)
        for other in others.values():
            alike = isinstance(other, type(part.config))
            if alike and other.to_dict().get(path[0]) == before.get(path[0]):
                _change(other, path, value)


def _why_none(part: Any, target: Target) -> str:
    """A number that stands for several blocks, which were cut to several sizes; or any tensor."""
    base, small = target.base.dims(), target.small.dims()
    for path, value in _fields(part.config):
        for new in _proposals(value, target.changes(), only_equal=value is not None):
            built = _built(part, [(path, new)])
            if built is not None and built.shapes.keys() == target.small.shapes.keys():
                dims = built.dims()
                moved = [p for p in small if dims.get(p) == new != base.get(p)]
                found = {small[place] for place in moved}
                cut_to = [small[place] for place in moved if small[place] != base.get(place)]
                if len(found) > 1 and cut_to:
                    return (
                        f"config.{'.'.join(map(str, path))} is one number for sizes that are "
                        f"{sorted(found)} now: prune all of them to one, such as {max(cut_to)}"
                    )
    names = (n for n, shape in target.small.shapes.items() if shape != target.base.shapes[n])
    name = next(names, None)
    if name is None:
        return "no config was found that builds the numbers that its modules hold"
    return f"no config was found that builds {name!r} of shape {target.small.shapes[name]}"
