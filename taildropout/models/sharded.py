"""Models of which each process holds a part."""

from typing import Any

from torch import Tensor, nn

from ..functional.shards import is_fully_sharded, is_sharded
from .copies import PruningError, tensors_by_name
from .insert import tail_dropouts


def check_whole_tensors(model: nn.Module) -> None:
    """For what changes a model: all of it must be here."""
    sharded = [name for name, tensor in tensors_by_name(model).items() if is_sharded(tensor)]
    sharded += [name or "the model" for name, m in model.named_modules() if is_fully_sharded(m)]
    if sharded:
        raise PruningError(
            "the parameters of the model must be whole in each process, got sharded ones, such as "
            f"{sharded[0]!r}: load their full state dict (get_model_state_dict of "
            "torch.distributed.checkpoint, with full_state_dict=True) into a model that is not "
            "sharded"
        )
    _check_no_mesh(model, PruningError)


def check_whole_layers(model: nn.Module, call: str) -> None:
    """For what runs a model: under fully_shard, which gathers each layer when it runs, they are.

    The processes of a tensor-parallel group have parts of the layers and the same samples. What
    adds up the samples of all processes would count them several times.
    """
    sharded = _tensor_parallel(model)
    if sharded:
        raise ValueError(
            f"{call} needs a model whose layers are whole in each process, and {sharded!r} is "
            "sharded, as in tensor parallelism: load its full state dict (get_model_state_dict of "
            "torch.distributed.checkpoint, with full_state_dict=True) into a model that is not, or "
            "run this one inside at_width and compute the losses yourself"
        )
    _check_no_mesh(model, ValueError)


def _tensor_parallel(model: nn.Module) -> str | None:
    """The name of a parameter or buffer that is sharded while its module runs, too."""
    fully_sharded: list[Any] = [module for module in model.modules() if is_fully_sharded(module)]
    for module in fully_sharded:
        module.reshard()  # or the shards of a tensor-parallel group are all that is seen
    gathered = {parameter for module in fully_sharded for parameter in module.parameters()}
    for name, tensor in tensors_by_name(model).items():
        if is_sharded(tensor) and not (tensor in gathered and _is_data_parallel(tensor)):
            return name
    return None


def _is_data_parallel(parameter: Tensor) -> bool:
    """By one dim of the mesh, the last one, shards are gathered; by others there are copies."""
    assert is_sharded(parameter)
    return all(placement.is_replicate() for placement in parameter.placements[:-1])


def _check_no_mesh(model: nn.Module, error: type[Exception]) -> None:
    for name, layer in tail_dropouts(model).items():
        if layer.device_mesh is not None:
            raise error(
                f"layer {name!r} must see all features in each process, and has a device_mesh, "
                "along which they are sharded: set it to None in a model that is not sharded"
            )
