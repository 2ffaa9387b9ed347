"""What a forward pass leaves for activation checkpointing, which computes parts of it again.

A checkpoint runs a module once more in backward, after it has put torch's random state back to
what it was. So the state at a call tells which call of the forward pass is computed again.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_LIMIT = 100_000  # calls between a forward pass and its backward, kept in 20 MB at most


def in_backward() -> bool:
    """Whether autograd runs: what calls a module then computes it again."""
    return torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a checkpoint may be around: it records no gradient, or keeps tensors its own way."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or not torch.is_grad_enabled()


def random_state() -> int | None:
    """The state of torch's generator on the CPU, hashed; None where no values can be looked at."""
    state = torch.get_rng_state()
    return hash(state.numpy().tobytes()) if type(state) is Tensor else None


class Calls:
    """What calls of a forward pass had, by the random state at each."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def keep(self, value: Any, *key: Any) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > _LIMIT:
            self._kept.popitem(last=False)

    def find(self, *key: Any) -> Any:
        """None where there was no such call."""
        return self._kept.get(key)


class SettingsOfCalls:
    """The k or width that was set in each call of a layer; a copy has seen none."""

    def __init__(self) -> None:
        self._calls = Calls()

    def check(self, setting: int | float | Tensor | None) -> None:
        """Raise if a call is computed again under another setting, where that can be seen."""
        if in_backward():
            before = self._calls.find(random_state())
            if before is not None and not any(_same(setting, one) for one in before):
                raise RuntimeError(
                    "set_k and at_width must be the same in backward as in the forward pass that a "
                    f"checkpoint computes again, got {setting} after {before[-1]}: put backward() "
                    "inside the with block, too"
                )
        elif may_be_recomputed() and (state := random_state()) is not None:
            before = self._calls.find(state) or []
            if not any(_same(setting, one) for one in before):
                self._calls.keep([*before, setting], state)

    def __reduce__(self) -> tuple[type["SettingsOfCalls"], tuple[()]]:
        return type(self), ()


def _same(one: int | float | Tensor | None, other: int | float | Tensor | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.device == other.device and torch.equal(one, other))
    return type(one) is type(other) and one == other
