"""Copies of a model, and its tensors by name."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class PruningError(RuntimeError):
    """The network can't be cut such that it provably computes the same."""


def first_line(error: Exception) -> str:
    """Of its message, with its kind."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not in the state dict too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors with the model: its modules can be changed freely."""
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return without_cache(copy.deepcopy(model, {id(t): t for t in tensors}))
    except Exception as error:
        message = str(error).strip().partition(". ")[0]
        raise PruningError(f"the model must be one that copy.deepcopy copies: {message}") from error


def copy_that_shares(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """A copy with these tensors of the model, and its own in place of all others."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for buffer in model.buffers():  # copy.deepcopy refuses what was computed from parameters
        if buffer.grad_fn is not None:
            memo.setdefault(id(buffer), buffer.detach().clone())
    return copy.deepcopy(model, memo)


def with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy that shares what running it does not change: its parameters, for the most part."""
    changed = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None  # an embedding renormalises its table
        for parameter in module.parameters()
    }
    shared = (p for p in model.parameters() if id(p) not in changed)
    return without_cache(copy_that_shares(model, shared))


def without_cache(model: nn.Module) -> nn.Module:
    """The copy itself, which no longer returns keys and values beside what it computes.

    The language models of Hugging Face return them by default, in an object that neither
    `torch.export` nor a comparison looks into.
    """
    for module in model.modules():
        config: Any = vars(module).get("config")
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
    return model
