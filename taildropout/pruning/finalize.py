"""A network without the library."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..layers import TailDropout, TailLinear, TailMLP
from ..layers.fitted import FittedTailDropout
from ..layers.linear import become_linear
from ..layers.mlp import gated_module
from ..models.insert import tail_dropouts
from ..models.names import name_in

_LIBRARY = __name__.partition(".")[0]
_FORWARDS = (
    *(TailDropout.forward, FittedTailDropout.forward),
    *(TailLinear.forward, TailMLP.forward),
)
_PADS: tuple[Callable[[Any, float], nn.Module], ...] = (
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)


def finalize(model: nn.Module) -> nn.Module:
    """A copy without the library's layers, for use: a plain network of torch's and your modules.

    Its outputs are those of the model in eval mode, in training too: nothing is dropped any more,
    and it can't be pruned further. It can be pickled and loaded where this library is not
    installed. All state-dict keys stay, but those of a `tail_bias`.

    | before | after |
    |---|---|
    | a TailDropout in a Sequential, or an attribute of a module | `nn.Identity` |
    | a TailDropout by `insert` | removed, with its hook |
    | a TailDropout of a pruned network that slices, or adds zeros | `nn.ConstantPad1d`, 2d or 3d |
    | one that slices, by `insert` at the input of an `nn.Linear` | columns of zeros in its weight |
    | a TailLinear | `nn.Linear` |
    | a TailMLP | `nn.Sequential` of `fc1`, `activation` and `fc2` |
    | a gated TailMLP | a `torch.fx.GraphModule` of `gate`, `activation`, `up` and `down` |

    Args:
        model: mostly a pruned one; it is left untouched.

    Raises:
        ValueError: a k is set, or a layer has no plain counterpart; the message says which, and
            why.

    Example:
        >>> from taildropout import prune
        >>> model = nn.Sequential(nn.Linear(8, 16), TailDropout(), nn.ReLU(), nn.Linear(16, 4))
        >>> finalize(prune(model, 5, torch.randn(2, 8)))
        Sequential(
          (0): Linear(in_features=8, out_features=5, bias=True)
          (1): Identity()
          (2): ReLU()
          (3): Linear(in_features=5, out_features=4, bias=True)
        )
    """
    for name, layer in tail_dropouts(model).items():
        if layer.set_k_for(sys.maxsize) is not None:
            raise ValueError(
                f"no k may be set in a network that is finalized, which would forget it; layer "
                f"{name!r} is {layer}: prune first, or set_k(None)"
            )
    return _plain(copy.deepcopy(model), "", {})


def _plain(module: nn.Module, name: str, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module, changed in place, or another one in its place."""
    if module in done:
        return done[module]
    if type(module) is TailLinear:
        become_linear(module, module.in_features)
    applied = set(_drop_hooks(module))
    for attribute, child in list(module._modules.items()):
        if child is None:
            continue
        path = name_in(name, attribute)
        if attribute in applied and _takes_over(module, child):
            del module._modules[attribute]
            continue
        plain = _plain(child, path, done)
        if attribute not in applied:
            module._modules[attribute] = plain
        elif isinstance(plain, nn.Identity):
            del module._modules[attribute]
        else:
            raise ValueError(
                f"layer {path!r} was inserted, and slices features or adds zeros: without this "
                "library there is no hook that does so. Put a TailDropout into the model's code "
                "instead, or keep this library for it"
            )
    done[module] = _in_place_of(module, name)
    return done[module]


def _takes_over(module: nn.Module, child: nn.Module) -> bool:
    """Give a Linear behind an inserted layer that slices columns of zeros, if that is what it is."""
    if not (
        type(module) is nn.Linear
        and isinstance(child, FittedTailDropout)
        and child.behind == 0
        and child.arrives is not None
        and child.width == child.size == module.in_features
    ):
        return False
    weight = functional.pad(module.weight.detach(), (0, child.arrives - child.width))
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    module.in_features = child.arrives
    return True


def _in_place_of(module: nn.Module, name: str) -> nn.Module:
    """Of a module whose children are plain."""
    plain: nn.Module
    if (
        isinstance(module, TailDropout | TailLinear | TailMLP)
        and type(module).forward not in _FORWARDS
    ):
        raise ValueError(
            f"module {name!r} is a {type(module).__name__}, whose forward is its own: replace it "
            "by what it should be without this library"
        )
    if isinstance(module, TailMLP):
        plain = _plain_mlp(module, name)
    elif isinstance(module, FittedTailDropout):
        plain = _slice_and_zeros(module, name)
    elif isinstance(module, TailDropout):
        plain = nn.Identity()
    elif _is_of_library(type(module)):
        raise ValueError(
            f"module {name!r} is a {type(module).__name__} of this library, which has no plain "
            "counterpart"
        )
    else:
        return module
    plain.training = module.training
    vars(plain).update({key: value for key, value in vars(module).items() if "_hook" in key})
    return plain


def _slice_and_zeros(layer: FittedTailDropout, name: str) -> nn.Module:
    """Negative padding takes features away."""
    if layer.arrives is None or layer.behind is None:
        raise ValueError(
            f"layer {name!r} slices features or adds zeros, and is called in several ways, or "
            "comes from a file that does not say how: torch has no module for it"
        )
    if layer.behind >= len(_PADS):
        raise ValueError(
            f"layer {name!r} slices features or adds zeros {layer.behind} dims from the end: torch "
            f"has modules for up to {len(_PADS) - 1}"
        )
    amounts = (layer.width - layer.arrives, layer.size - layer.width)
    pad, behind = _PADS[layer.behind], (0, 0) * layer.behind
    pads = [pad((*behind, 0, amount), 0.0) for amount in amounts if amount]
    if len(pads) == 1:
        return pads[0]
    return nn.Sequential(*pads) if pads else nn.Identity()


def _plain_mlp(mlp: TailMLP, name: str) -> nn.Module:
    """Under the same names, for the state dict."""
    activation: Any = mlp.activation
    if not isinstance(activation, nn.Module):
        activation = _module_of(activation, name)
    modules = OrderedDict[str, Any](mlp.in_turn)
    modules["activation"] = activation
    if isinstance(modules["dropout"], nn.Identity):
        del modules["dropout"]
    return gated_module(modules) if mlp.gated else nn.Sequential(modules)


def _module_of(function: Any, name: str) -> nn.Module:
    """torch's module of the name of a function of torch."""
    called = getattr(function, "__name__", "")
    if called and any(getattr(place, called, None) is function for place in (functional, torch)):
        for kind in vars(nn.modules.activation).values():
            if isinstance(kind, type) and kind.__name__.lower() == called.replace("_", ""):
                module: nn.Module = kind()
                return module
    raise ValueError(
        f"the activation of TailMLP {name!r} must be a module for it to be finalized, got {function}"
    )


def _drop_hooks(module: nn.Module) -> Iterator[str]:
    """Take the library's hooks off a module; the names of the children that they applied."""
    kept = [value for key, value in vars(module).items() if "_hooks" in key]
    ours = {
        number: hook
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for number, hook in hooks.items()
        if _is_of_library(hook)
    }
    for number, hook in ours.items():
        for hooks in kept:
            hooks.pop(number, None)
        if hasattr(hook, "child"):
            yield hook.child


def _is_of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] == _LIBRARY
