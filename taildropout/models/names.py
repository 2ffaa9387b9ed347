"""Names of modules: patterns of them, and what wraps a model taken out of them."""

import re
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..layers.holding import HoldsDropout
from ..layers.hooks import inserted_children

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name without what compiling, checkpointing and data parallelism put into it."""
    parts, module = [], model
    for part in filter(None, name.split(".")):
        parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        if part not in _WRAPPERS and not (parallel and part == "module"):
            parts.append(part)
        module = getattr(module, part)
    return ".".join(parts)


def name_in(module: str, child: str) -> str:
    """The name of what a module holds; the model's own name is empty."""
    return f"{module}.{child}" if module else child


def names_of_layer(model: nn.Module, name: str) -> set[str]:
    """What a layer answers to: its name, also without wrappers, and, of an inserted one or that of
    a TailLinear or TailMLP, the name of the module at which it is."""
    owner, _, child = name.rpartition(".")
    names = {name, plain_name(model, name)}
    module = model.get_submodule(owner)
    if isinstance(module, HoldsDropout) or child in inserted_children(module):
        names |= {owner, plain_name(model, owner)} - {""}
    return names


def fits_pattern(pattern: Any, name: str) -> bool:
    """Whether it is the name, or a pattern (`*`, `?`, `[...]`, or "re:...") that fits it."""
    if not isinstance(pattern, str):
        return False
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return pattern == name or fnmatchcase(name, pattern)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside whatever compiles it, checkpoints it or makes it data parallel."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside: Any = "module"
        else:
            inside = next(iter(_WRAPPERS & model._modules.keys()), None)
        if inside is None:
            return model
        model = model.get_submodule(inside)


def is_pattern(name: str | None) -> bool:
    """Whether it may fit several names."""
    return name is not None and (name.startswith("re:") or any(c in name for c in "*?["))
