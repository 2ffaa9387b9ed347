"""Hooks that stay in a user's model: they can be pickled and copied with it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ApplyChild:
    """A forward hook that sends the module's output through its child; it can be pickled."""

    def __init__(self, child: str) -> None:
        self.child = child

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        layer = getattr(module, self.child)
        if isinstance(output, Tensor):
            return layer(output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return type(output)([layer(output[0]), *output[1:]])
        raise TypeError(
            f"the output of {type(module).__name__} must be a tensor, or a tuple of which the first "
            f"is one, for a TailDropout to be applied to it, got {type(output).__name__}"
        )


class ApplyChildToInput:
    """A forward pre-hook that sends the module's first input through its child."""

    def __init__(self, child: str) -> None:
        self.child = child

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layer = getattr(module, self.child)
        if args and isinstance(args[0], Tensor):
            return (layer(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs.items()), (None, None)) if not args else (None, args[0])
        if isinstance(first[1], Tensor) and first[0] is not None:
            return args, {**kwargs, first[0]: layer(first[1])}
        raise TypeError(
            f"the first input of {type(module).__name__} must be a tensor for a TailDropout to be "
            f"applied to it, got {type(first[1]).__name__}"
        )


InsertedHook = ApplyChild | ApplyChildToInput


def drop_hooks(module: nn.Module, goes: Callable[[Any], bool]) -> None:
    """Take those of a module's forward hooks and pre-hooks out of which `goes` is true."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if goes(hook)]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)


def inserted_children(module: nn.Module) -> list[str]:
    """The children that `insert` gave it, in order."""
    if type(module).forward is nn.Sequential.forward:
        own = [child for child in module._modules if child.startswith("tail_dropout")]
    else:
        own = []
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own += [hook.child for hook in hooks if isinstance(hook, InsertedHook)]
    return [child for child in module._modules if child in own]
