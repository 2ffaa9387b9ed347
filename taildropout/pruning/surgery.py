"""Cutting the user's own modules, in place."""

import torch
from torch import Tensor, nn

from .analysis import Cut, Fold, tensors_by_name


def operate(model: nn.Module, cuts: list[Cut], folds: list[Fold]) -> None:
    """Cut the model's parameters and buffers in place, and mend its modules' attributes.

    Every tensor that changes is a new one, so a model that shares tensors with another leaves
    the other as it is.
    """
    with torch.no_grad():
        for fold in folds:  # before its rows are cut
            _fold(model, fold)
        for cut in cuts:
            tensor = tensors_by_name(model)[cut.name]
            keep = torch.tensor(cut.keep, dtype=torch.int64, device=tensor.device)
            _set(model, cut.name, tensor.index_select(cut.dim, keep), like=tensor)
    for module in {cut.name.rpartition(".")[0] for cut in cuts}:
        _mend_attributes(model.get_submodule(module))


def _fold(model: nn.Module, fold: Fold) -> None:
    tensors = tensors_by_name(model)
    bias = tensors.get(fold.name)
    if bias is None:
        weight = tensors[fold.name.removesuffix("bias") + "weight"]
        _set(model, fold.name, fold.constant.to(weight.device, weight.dtype), like=weight)
    else:
        total = bias.double() + fold.constant.to(bias.device)
        _set(model, fold.name, total.to(bias.dtype), like=bias)


def _set(model: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    if isinstance(like, nn.Parameter):
        value = nn.Parameter(value, requires_grad=like.requires_grad)
    setattr(model.get_submodule(module), attribute, value)


def _mend_attributes(module: nn.Module) -> None:
    """Make the sizes that torch's modules print and check fit their tensors again."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        assert tensor is not None
        module.num_features = len(tensor)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
