"""Rearranging features in the tensors of a model, and in what its optimizer keeps of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.copies import PruningError, copy_that_shares, tensors_by_name
from .surgery import Tensors, like

# What optimizers keep for each entry of a parameter. What is linear in gradients, or like the
# parameter, turns as it does. A rotation makes each new gradient a sum of old ones, whose mean square
# is the sum of theirs times the squared coefficients, as far as the old ones are uncorrelated.
_LINEAR = {"exp_avg", "momentum_buffer", "grad_avg", "ax", "z", "prev"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"}


@dataclass(frozen=True, eq=False)
class Move:
    """What becomes of a tensor along `dim`.

    Attributes:
        names: of the tensor; a tied one has several.
        by: for each index the one that it was before, `(n,)`; or a rotation, `(n, n)`, whose
            columns say what each new feature is of the old ones.
    """

    names: tuple[str, ...]
    dim: int
    by: Tensor

    @property
    def turns(self) -> bool:
        return self.by.ndim == 2


def rearranged(tensor: Tensor, dim: int, by: Tensor) -> Tensor:
    by = by.to(tensor.device)
    if by.ndim == 1:
        return tensor.index_select(dim, by)
    by = by.to(torch.promote_types(tensor.dtype, torch.float32))
    turned = tensor.movedim(dim, -1).to(by.dtype) @ by
    return turned.movedim(-1, dim).to(tensor.dtype)


def rearranged_copy(model: nn.Module, moves: Sequence[Move]) -> nn.Module:
    """A copy with other tensors where something moves; the model is left as it is."""
    tensors = tensors_by_name(model)
    check_fit(tensors, moves)
    copied = copy_that_shares(model, [tensors[move.names[0]] for move in moves])
    new = Tensors(copied)
    with torch.no_grad():
        for move in moves:
            before = new.by_name[move.names[0]]
            value = torch.empty_like(before).copy_(rearranged(before, move.dim, move.by))
            value = like(value, before)
            for name in move.names:
                new.set(name, value)
    return copied


def check_fit(tensors: dict[str, Tensor], moves: Sequence[Move]) -> None:
    for move in moves:
        tensor, n = tensors.get(move.names[0]), len(move.by)
        if tensor is None or tensor.ndim <= move.dim or tensor.shape[move.dim] != n:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise PruningError(
                f"the plan rearranges {move.names[0]!r} of size {n} along dim {move.dim}, and the "
                f"model has {found}"
            )


def rearrange(model: nn.Module, moves: Sequence[Move], optimizer: Optimizer) -> None:
    """In place, with gradients and the optimizer's state; after an exception all is as before.

    Raises:
        ValueError: the optimizer holds no parameter of the model, or keeps something of which it
            is not known what becomes of it.
    """
    tensors = tensors_by_name(model)
    check_fit(tensors, moves)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError(
            "the optimizer must hold the parameters of the model, and holds none of them: pass the "
            "one that trains it"
        )
    changes: list[tuple[Tensor, int, Tensor]] = []
    for move in moves:
        tensor = tensors[move.names[0]]
        changes.append((tensor, move.dim, move.by))
        if tensor.grad is not None:
            changes.append((tensor.grad, move.dim, move.by))
        changes += _changes_of_state(optimizer.state.get(tensor, {}), tensor, move)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, dim, by in changes:
                new = rearranged(tensor, dim, by)
                before.append((tensor, tensor.clone()))
                tensor.copy_(new)
    except BaseException:  # Ctrl-C too
        with torch.no_grad():
            for tensor, value in reversed(before):
                tensor.copy_(value)
        raise


def can_turn(optimizer: Optimizer) -> bool:
    """Whether it is known what a rotation makes of all that the optimizer keeps."""
    return all(
        key in _LINEAR | _SQUARES
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.numel() > 1
    )


def _changes_of_state(
    state: dict[str, Any], parameter: Tensor, move: Move
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """What moves in an optimizer's state of a parameter: all tensors of its shape, or parts of it."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if isinstance(value, list | tuple | dict) and value:
                raise ValueError(_unknown(key, move, f"a {type(value).__name__}"))
            continue
        if value.ndim == 0 or (value.numel() == 1 and parameter.numel() > 1):
            continue
        sizes = list(zip(value.shape, parameter.shape, strict=False))
        if value.ndim != parameter.ndim or any(a not in (1, b) for a, b in sizes):
            raise ValueError(_unknown(key, move, f"a tensor of shape {tuple(value.shape)}"))
        if value.shape[move.dim] != parameter.shape[move.dim]:
            continue  # one for all features, as the means of Adafactor
        if not move.turns or key in _LINEAR:
            yield value, move.dim, move.by
        elif key in _SQUARES:
            yield value, move.dim, move.by.square()
        else:
            raise ValueError(
                f"the optimizer keeps {key!r} of {move.names[0]!r}, and it is not known what a "
                "rotation makes of it: plan with rotate=False, which permutes"
            )


def _unknown(key: str, move: Move, found: str) -> str:
    return (
        f"the optimizer must keep tensors of the shape of its parameters, to be rearranged with "
        f"them, and {key!r} of {move.names[0]!r} is {found}: order before training with it"
    )
