"""Copies of a model, and its tensors by name."""

import copy

from torch import Tensor, nn


class PruningError(RuntimeError):
    """The network can't be cut such that it provably computes the same."""


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
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as error:
        message = str(error).strip().partition(". ")[0]
        raise PruningError(f"the model must be one that copy.deepcopy copies: {message}") from error


def with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters only: running it may change buffers."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
