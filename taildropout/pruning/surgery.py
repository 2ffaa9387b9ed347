"""Cutting the user's own modules, in place."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.fitted import FittedTailDropout
from ..layers.linear import TailLinear, become_linear
from ..models.copies import PruningError, tensors_by_name
from ..models.insert import tail_dropouts
from .cuts import Cut, Fit, Fold, Rescale, ToLinear
from .sizes import mend_attributes, mend_named_sizes, mend_written_sizes, sizes_of_linears

# torch.nn.utils.parametrize keeps the tensors of a module's weight in a module of its own.
_OF_PARAMETRIZATION = re.compile(r"\.?parametrizations\.\w+$")


def operate(
    model: nn.Module,
    cuts: Sequence[Cut],
    folds: Sequence[Fold],
    fits: Sequence[Fit] = (),
    rescales: Sequence[Rescale] = (),
    to_linears: Sequence[ToLinear] = (),
) -> None:
    """Cut the model's parameters and buffers in place, and mend its modules' attributes.

    Every tensor that changes is a new one, so a model that shares tensors with another leaves
    the other as it is.
    """
    before, tensors = sizes_of_linears(model), Tensors(model)
    shapes = {name: tensor.shape for name, tensor in tensors.by_name.items()}
    with torch.no_grad():
        for fold in folds:  # before its rows are cut
            _fold(tensors, fold)
        _rescale(tensors, rescales)
        new: dict[tuple[int, int], Any] = {}  # a tied tensor stays tied
        for cut in cuts:
            tensor = tensors.by_name[cut.name]
            key = (id(tensor), cut.dim)
            if key not in new:
                keep = torch.tensor(cut.keep, dtype=torch.int64, device=tensor.device)
                value = tensor.index_select(cut.dim, keep)
                new[key] = (like(value, tensor), tensor)  # which must outlive its id
            tensors.set(cut.name, new[key][0])
    layers = tail_dropouts(model)
    for fit in fits:
        layer = layers[fit.layer]
        owner, _, attribute = fit.layer.rpartition(".")
        fitted = FittedTailDropout.fit(layer, fit.width, fit.size, fit.arrives, fit.behind)
        setattr(model.get_submodule(owner), attribute, fitted)
    for to_linear in to_linears:
        linear = model.get_submodule(to_linear.name)
        if not isinstance(linear, TailLinear):
            raise PruningError(
                f"module {to_linear.name!r} must be a TailLinear, got {type(linear).__name__}"
            )
        become_linear(linear, to_linear.k)
    for module in {_OF_PARAMETRIZATION.sub("", cut.name.rpartition(".")[0]) for cut in cuts}:
        mend_attributes(model.get_submodule(module))
        mend_named_sizes(model.get_submodule(module), module, shapes)
    mend_written_sizes(model, before)


class Tensors:
    """The parameters and buffers of a model, by name, that new ones take the place of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name = tensors_by_name(model)

    def set(self, name: str, value: Tensor) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(module), attribute, value)
        self.by_name[name] = value


def _fold(tensors: Tensors, fold: Fold) -> None:
    bias = tensors.by_name.get(fold.name)
    if bias is None:
        weight = tensors.by_name[fold.name.removesuffix("bias") + "weight"]
        tensors.set(fold.name, like(fold.constant.to(weight.device, weight.dtype), weight))
    else:
        total = bias.double() + fold.constant.to(bias.device)
        tensors.set(fold.name, like(total.to(bias.dtype), bias))


def _rescale(tensors: Tensors, rescales: Sequence[Rescale]) -> None:
    """Once for each weight and each eps, however many norms share it."""
    of_weights = {rescale.weights: rescale for rescale in rescales}
    of_eps = {(rescale.module, rescale.eps): rescale for rescale in rescales}
    dtypes = {rescale.module: tensors.by_name[rescale.weights[0]].dtype for rescale in rescales}
    for names, rescale in of_weights.items():
        weight = tensors.by_name[names[0]]
        total = (weight.double() + rescale.plus) * rescale.factor - rescale.plus
        new = like(total.to(weight.dtype), weight)  # a tied one stays tied
        for name in names:
            tensors.set(name, new)
    for (name, attribute), rescale in of_eps.items():
        if attribute is not None:
            module: Any = tensors.model.get_submodule(name)
            eps = getattr(module, attribute)
            eps = torch.finfo(dtypes[name]).eps if eps is None else eps  # as torch has it
            setattr(module, attribute, eps * rescale.before / rescale.after)
            if getattr(module, "normalized_shape", None) == (rescale.before,):
                module.normalized_shape = (rescale.after,)


def like(value: Tensor, tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value
