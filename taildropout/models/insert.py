"""Putting layers into someone else's model, finding them, taking them out."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from ..layers import TailDropout
from ..layers.hooks import (
    ApplyChild,
    ApplyChildToInput,
    InsertedHook,
    drop_hooks,
    inserted_children,
)
from .names import fits_pattern, names_of_layer, plain_name

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def tail_dropouts(model: nn.Module) -> dict[str, TailDropout]:
    """The model's TailDropout layers by qualified name, in the order of `named_modules()`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), TailDropout(0.2), nn.Linear(8, 2))
        >>> tail_dropouts(model)
        {'1': TailDropout(p=0.2, batch_dim=0, dropout_dim=-1)}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, TailDropout)}


def layers_that_fit(model: nn.Module, pattern: str) -> dict[str, TailDropout]:
    """The layers that a pattern, or any of the names that they answer to, is meant for."""
    return {
        name: layer
        for name, layer in tail_dropouts(model).items()
        if any(fits_pattern(pattern, own) for own in names_of_layer(model, name))
    }


def insert(
    model: nn.Module, name: str, layer: TailDropout, at: Literal["output", "input"] = "output"
) -> TailDropout:
    """Apply a TailDropout to the output, or the input, of any module of a model.

    The layer becomes a child of the module, `NAME.tail_dropout`, which a forward hook applies to
    its output or first input. It is put into the mode of the module, for a model that was loaded
    is often in eval mode, and follows the model's `train()`, `eval()`, `to()`, pickle and deepcopy;
    no key of the state dict changes. Of an output that is a tuple, the first entry goes through
    the layer, as a GRU has it.

    Args:
        model: changed in place.
        name: qualified name of the module, as in `model.named_modules()`.
        layer: the layer; its dims are those of the module's output or input.
        at: "output", or "input": in front of an attention's output projection, say, whose input
            are its heads.

    Returns:
        The layer.

    Raises:
        ValueError: the model has no such module, the module is never called (a ModuleList), the
            layer is in the model already, or `at` is another word.
        TypeError: `layer` is no TailDropout; in a call, an output or input that is no tensor or
            tuple.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = insert(model, "1", TailDropout(0.2))
        >>> _ = insert(model, "0", TailDropout(0.1), at="input")
        >>> tail_dropouts(model)  # doctest: +NORMALIZE_WHITESPACE
        {'0.tail_dropout': TailDropout(p=0.1, batch_dim=0, dropout_dim=-1),
         '1.tail_dropout': TailDropout(p=0.2, batch_dim=0, dropout_dim=-1)}
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if not isinstance(layer, TailDropout):
        raise TypeError(f"layer must be a TailDropout, got {type(layer).__name__}")
    if at not in ("output", "input"):
        raise ValueError(f'at must be "output" or "input", got {at!r}')
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(f"name must be that of a module of the model, got {name!r}")
    module = modules[name]
    if isinstance(module, _NEVER_CALLED):
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which has no output: name a child"
        )
    runs_children = type(module).forward is nn.Sequential.forward
    if runs_children and at == "input":
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which would run the layer at its end: name "
            "its first child"
        )
    if layer in modules.values():
        raise ValueError("each layer can be inserted once: make another TailDropout")
    child = "tail_dropout"
    while hasattr(module, child):
        child += "_"
    layer.training = module.training  # not train(), which would clear a k that is set
    module.add_module(child, layer)
    if at == "input":
        module.register_forward_pre_hook(ApplyChildToInput(child), with_kwargs=True)
    elif not runs_children:
        module.register_forward_hook(ApplyChild(child))
    return layer


def insert_each(
    model: nn.Module,
    pattern: str | Iterable[str] | Callable[[nn.Module, str], bool],
    layer: TailDropout,
    at: Literal["output", "input"] = "output",
) -> dict[str, TailDropout]:
    """Put a copy of a TailDropout at every module that matches, as `insert` does.

    Args:
        model: changed in place; not at all if any of the layers can't be inserted.
        pattern: of qualified names, with `*`, `?` and `[...]` as in a shell; a regular
            expression, `"re:..."`; names; or a function of a module and its name that says
            whether.
        layer: the layer of which each place gets a copy.
        at: "output" or "input".

    Returns:
        The layers by the names of the modules at which they are. `remove`, `at_width`, `prune`
        and the others take these names, too.

    Raises:
        ValueError: nothing matches, a name that the model does not have, or as in `insert`.
        TypeError: as in `insert`.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
        >>> insert_each(nn.Sequential(*blocks), "*.2", TailDropout(0.5), at="input").keys()
        dict_keys(['0.2', '1.2'])
    """
    inserted: dict[str, TailDropout] = {}
    try:
        for name in _names(model, pattern):
            inserted[name] = insert(model, name, copy.deepcopy(layer), at)
    except Exception:
        for name in inserted:
            remove(model, name)
        raise
    return inserted


def remove(model: nn.Module, name: str) -> TailDropout:
    """Take an inserted layer out again.

    Args:
        model: changed in place.
        name: the name that `insert` took. Of several layers at that module the one that was
            inserted last goes, or the one whose own name is given (`NAME.tail_dropout`).

    Returns:
        The layer.

    Raises:
        ValueError: there is no inserted layer of this name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> layer = insert(model, "1", TailDropout(0.2))
        >>> remove(model, "1") is layer, tail_dropouts(model)
        (True, {})
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owner, _, child = name.rpartition(".")
    if name in modules and (inserted := inserted_children(modules[name])):
        module, child = modules[name], inserted[-1]
    elif owner in modules and child in inserted_children(modules[owner]):
        module = modules[owner]
    else:
        raise ValueError(f"name must be that of an inserted layer, got {name!r}")
    layer = getattr(module, child)
    assert isinstance(layer, TailDropout)
    drop_hooks(module, lambda hook: isinstance(hook, InsertedHook) and hook.child == child)
    if layer.together is not None:
        layer.together.replace(layer)
        layer.together = None
    delattr(module, child)
    return layer


def _names(
    model: nn.Module, pattern: str | Iterable[str] | Callable[[nn.Module, str], bool]
) -> list[str]:
    """Of the modules that match; a list of names is taken at its word."""
    if not isinstance(pattern, str) and not callable(pattern):
        names = list(pattern)
    else:
        kept_out = (*_NEVER_CALLED, TailDropout)
        names = [
            name
            for name, module in model.named_modules()
            if not isinstance(module, kept_out)
            and (
                pattern(module, name)
                if callable(pattern)
                else any(fits_pattern(pattern, own) for own in (name, plain_name(model, name)))
            )
        ]
    if not names:
        raise ValueError(f"pattern must match modules of the model, and none fits {pattern!r}")
    return names


def replace_dropout(model: nn.Module, pattern: str = "*", **options: Any) -> list[str]:
    """Replace `nn.Dropout` modules by TailDropouts of the same p.

    Args:
        model: changed in place.
        pattern: of the qualified names, with `*`, `?` and `[...]` as in a shell, or "re:...".
        options: arguments of `TailDropout`, such as its dims.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: no `nn.Dropout` has such a name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        >>> replace_dropout(model)
        ['1']
        >>> model[1]
        TailDropout(p=0.3, batch_dim=0, dropout_dim=-1)
    """
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Dropout) and name and fits_pattern(pattern, name)
    ]
    if not names:
        raise ValueError(f"pattern must match the name of an nn.Dropout in it, got {pattern!r}")
    replacements: dict[nn.Module, TailDropout] = {}
    for name in names:
        dropout = model.get_submodule(name)
        assert isinstance(dropout, nn.Dropout)
        if dropout not in replacements:  # one module under two names stays one
            replacements[dropout] = TailDropout(**{"p": dropout.p, **options})
            replacements[dropout].train(dropout.training)
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, replacements[dropout])
    return names
