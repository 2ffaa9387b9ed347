"""Putting layers into someone else's model, finding them, taking them out."""

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..layers import TailDropout
from ..layers.hooks import ApplyChild


def tail_dropouts(model: nn.Module) -> dict[str, TailDropout]:
    """The model's TailDropout layers by qualified name, in the order of `named_modules()`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), TailDropout(0.2), nn.Linear(8, 2))
        >>> tail_dropouts(model)
        {'1': TailDropout(p=0.2, batch_dim=0, dropout_dim=-1)}
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, TailDropout)}


def insert(model: nn.Module, name: str, layer: TailDropout) -> TailDropout:
    """Apply a TailDropout to the output of any module of a model.

    The layer becomes a child of the module, `NAME.tail_dropout`, which a forward hook applies to
    its output. It is put into the mode of the module, for a model that was loaded is often in eval
    mode, and follows the model's `train()`, `eval()`, `to()`, pickle and deepcopy; no key of the
    state dict changes. Of an output that is a tuple, the first entry goes through the
    layer, as a GRU has it.

    Args:
        model: changed in place.
        name: qualified name of the module, as in `model.named_modules()`.
        layer: the layer; its dims are those of the module's output.

    Returns:
        The layer.

    Raises:
        ValueError: the model has no such module, the module is never called (a ModuleList), or
            the layer is in the model already.
        TypeError: `layer` is no TailDropout; in a call, an output that is no tensor or tuple.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = insert(model, "1", TailDropout(0.2))
        >>> tail_dropouts(model)
        {'1.tail_dropout': TailDropout(p=0.2, batch_dim=0, dropout_dim=-1)}
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if not isinstance(layer, TailDropout):
        raise TypeError(f"layer must be a TailDropout, got {type(layer).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(f"name must be that of a module of the model, got {name!r}")
    module = modules[name]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which has no output: name a child"
        )
    if layer in modules.values():
        raise ValueError("each layer can be inserted once: make another TailDropout")
    child = "tail_dropout"
    while hasattr(module, child):
        child += "_"
    layer.training = module.training  # not train(), which would clear a k that is set
    module.add_module(child, layer)
    if type(module).forward is not nn.Sequential.forward:  # which runs its last child anyway
        module.register_forward_hook(ApplyChild(child))
    return layer


def remove(model: nn.Module, name: str) -> TailDropout:
    """Take an inserted layer out again.

    Args:
        model: changed in place.
        name: the name that `insert` took. Of several layers behind that module the one that was
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
    if name in modules and (inserted := _inserted(modules[name])):
        module, child = modules[name], inserted[-1]
    elif owner in modules and child in _inserted(modules[owner]):
        module = modules[owner]
    else:
        raise ValueError(f"name must be that of an inserted layer, got {name!r}")
    layer = getattr(module, child)
    assert isinstance(layer, TailDropout)
    for key, hook in module._forward_hooks.items():
        if isinstance(hook, ApplyChild) and hook.child == child:
            del module._forward_hooks[key]
            break
    delattr(module, child)
    return layer


def _inserted(module: nn.Module) -> list[str]:
    """The children that `insert` gave it, in order."""
    if type(module).forward is nn.Sequential.forward:
        return [child for child in module._modules if child.startswith("tail_dropout")]
    hooks = module._forward_hooks.values()
    return [hook.child for hook in hooks if isinstance(hook, ApplyChild)]


def replace_dropout(model: nn.Module, pattern: str = "*", **options: Any) -> list[str]:
    """Replace `nn.Dropout` modules by TailDropouts of the same p.

    Args:
        model: changed in place.
        pattern: of the qualified names, with `*`, `?` and `[...]` as in a shell.
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
        if isinstance(module, nn.Dropout) and name and fnmatchcase(name, pattern)
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
