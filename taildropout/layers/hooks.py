"""Hooks that stay in a user's model: they can be pickled and copied with it."""

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
