"""The tensors of every width as slices of the whole ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.linear import factor_of
from ..layers.linear import TailLinear
from ..models.copies import tensors_by_name
from ..models.names import name_in
from ..pruning.plan import PrunePlan
from .boxes import is_within, runs_of, taken
from .files import bytes_of
from .layout import Runs, Scale, Stored, blocks_of, scaled


class Sliced:
    """A model's tensors at each width of a menu.

    Attributes:
        stored: those that are slices of the whole ones, by name. A tied one stands there once.
        tied: further names, and under which one the tensor is stored.
        own: for each width, those that are not, such as biases that took in a constant.

    Raises:
        PruningError: as in `PrunePlan.apply`: each width is verified.
    """

    def __init__(self, model: nn.Module, plans: Sequence[PrunePlan]) -> None:
        self._state = model.state_dict()
        self.stored = _whole(model, self._state, plans)
        self.own: list[dict[str, Tensor]] = []
        for plan in plans:
            small = plan.verified_copy(model).state_dict()
            scales = _scales(model, plan)
            for name, stored in self.stored.items():
                whole, part = self._state.get(name), small.get(name)
                if whole is None or part is None:
                    stored.scales.append(None)
                else:
                    stored.scales.append(_scale(stored, whole, part, scales.get(name)))
            self.own.append({n: tensor for n, tensor in small.items() if self._is_own(n)})
        self.tied = _tied(model, self.stored)
        self.stored = {n: stored for n, stored in self.stored.items() if n not in self.tied}

    def _is_own(self, name: str) -> bool:
        return name not in self.stored or self.stored[name].scales[-1] is None

    def added(self, width: int) -> Iterator[Tensor]:
        """The bytes that a width, by its number in the menu, adds to those of narrower ones."""
        for name, box in blocks_of(self.stored, width):
            yield bytes_of(taken(self._state[name], box))

    def only_of(self, width: int) -> Iterator[Tensor]:
        """The bytes that a width has for itself."""
        return map(bytes_of, self.own[width].values())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole(
    model: nn.Module, state: Mapping[str, Tensor], plans: Sequence[PrunePlan]
) -> dict[str, Stored]:
    """Of all tensors in the state dict, and others that are cut, with no scales yet."""
    cuts: dict[str, dict[int, Runs]] = {}
    for i, plan in enumerate(plans):
        for cut in plan.cuts:
            each = cuts.setdefault(cut.name, {}).setdefault(cut.dim, [None] * len(plans))
            each[i] = runs_of(cut.keep)
    return {
        name: Stored(
            tuple(tensor.shape),
            name_of(tensor.dtype) if name in state else None,
            cuts.get(name, {}),
            [],
        )
        for name, tensor in {**tensors_by_name(model), **state}.items()
        if name in state or name in cuts
    }


def _scales(model: nn.Module, plan: PrunePlan) -> dict[str, Scale]:
    """What pruning multiplies tensors by."""
    scales = {
        name: (rescale.factor, rescale.plus)
        for rescale in plan.rescales
        for name in rescale.weights
    }
    for to_linear in plan.to_linears:
        linear = model.get_submodule(to_linear.name)
        if isinstance(linear, TailLinear) and linear.scale is not None and to_linear.k:
            factor = factor_of(to_linear.k, len(linear.tail_bias))
            scales[name_in(to_linear.name, "weight")] = factor, 0.0
    return scales


def _scale(stored: Stored, whole: Tensor, part: Tensor, other: Scale | None) -> Scale | None:
    """With which a width's tensor is a slice of the whole, around that of the narrower width."""
    width = len(stored.scales)
    box, narrower = stored.box(width), stored.narrower(width)
    if narrower is not None and not is_within(narrower, box):
        return None
    slices = taken(whole, box)
    if slices.dtype != part.dtype or slices.shape != part.shape:
        return None
    value = bytes_of(part)
    for scale in [(1.0, 0.0), *([other] if other else [])]:
        if torch.equal(bytes_of(scaled(slices, scale)), value):
            return scale
    return None


def _tied(model: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """The names of tensors that have another name, and that one."""
    found = {**tensors_by_name(model), **model.state_dict(keep_vars=True)}
    first: dict[tuple[int, str], str] = {}
    ones = {n: first.setdefault((id(found[n]), repr(s)), n) for n, s in tensors.items()}
    return {name: one for name, one in ones.items() if one != name}


def record_of(sliced: Sliced) -> dict[str, Any]:
    """All tensors as plain data."""
    kept: list[Runs] = []
    tensors = {name: stored.to_dict(kept) for name, stored in sliced.stored.items()}
    return {"tensors": tensors, "tied": sliced.tied, "kept": kept}
