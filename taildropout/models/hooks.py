"""Looking into a model while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    hooks: Mapping[nn.Module, Callable[..., Any]], *, before: bool = False
) -> Iterator[None]:
    """Forward hooks inside, none of them left outside, also where a module takes no hook.

    Args:
        hooks: one for each module, as `register_forward_hook` takes it.
        before: they are forward pre-hooks instead.

    Example:
        >>> import torch
        >>> model, seen = nn.Linear(4, 3), []
        >>> with hooked({model: lambda module, args, output: seen.append(output.shape)}):
        ...     _ = model(torch.ones(2, 4))
        >>> seen
        [torch.Size([2, 3])]
    """
    with ExitStack() as stack:
        for module, hook in hooks.items():
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(add(hook).remove)
        yield


@contextmanager
def with_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module's `forward` is the one that is given; its hooks go on as before.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 3)
        >>> with with_forwards({model: lambda x: 2 * x}):
        ...     model(torch.ones(2))
        tensor([2., 2.])
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)
