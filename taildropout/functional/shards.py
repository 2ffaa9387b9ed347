"""Features that lie in several processes, as in tensor parallelism.

A `DTensor` of `torch.distributed.tensor` has the shape of the whole tensor and knows which part of
it this process holds. So k counts the features of the whole, and drawn ks are those of one process
for all: the layer computes what it computes where nothing is sharded.

Nothing of `torch.distributed.tensor` is imported before there is a DTensor.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor."""
    return type(tensor).__name__ == "DTensor"


def as_in_first_process(k: Tensor, input: Tensor) -> Tensor:
    """Of a DTensor's mesh; what each process drew where the input is a plain tensor.

    The others add zeros to it, since of all collectives a sum is one that the compiler knows.
    """
    if not is_sharded(input):
        return k
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = input.device_mesh
    for mesh_dim, index in enumerate(mesh.get_coordinate() or ()):
        placements = [Partial() if d == mesh_dim else Replicate() for d in range(mesh.ndim)]
        own = k if index == 0 else torch.zeros_like(k)
        k = DTensor.from_local(own, mesh, placements, run_check=False).full_tensor()
    return k


def k_of_part(k: int | Tensor, whole: "DTensor", dim: int) -> int | Tensor:
    """What a k of the whole, an int or a tensor that broadcasts, is for this process's part."""
    spans = _spans(whole)
    if isinstance(k, Tensor) and k.ndim > 0:
        for d, (start, size) in enumerate(spans):
            if d != dim and k.shape[d] == whole.shape[d]:
                k = k.narrow(d, start, size)
    start, size = spans[dim]
    return (k - start).clamp(0, size) if isinstance(k, Tensor) else min(max(k - start, 0), size)


def with_part(whole: "DTensor", part: Tensor) -> "DTensor":
    """The DTensor of which this process has another part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def as_part(part: Tensor, mesh: "DeviceMesh", dim: int, n: int) -> "DTensor":
    """The DTensor of n features along `dim` of which this is the process's part."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([n if d == dim else size for d, size in enumerate(part.shape)])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.detach(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride
    )


def features_of_all(n: int, mesh: "DeviceMesh", device: torch.device) -> int:
    """How many features all processes have together, where this one has n."""
    from torch.distributed.tensor import DTensor, Shard

    if mesh.ndim != 1:
        raise ValueError(
            "device_mesh must have one dim, along which the features are sharded, got "
            f'{mesh}: take a part of it, such as mesh["tp"]'
        )
    own = torch.tensor([n], device=device)
    sizes = DTensor.from_local(own, mesh, [Shard(0)], run_check=False).full_tensor().tolist()
    spans = [_chunk(sum(sizes), len(sizes), index) for index in range(len(sizes))]
    if sizes != [size for _, size in spans]:
        raise ValueError(
            "the shards of a layer's features must have the sizes that torch.chunk and "
            f"ColwiseParallel make, {[size for _, size in spans]} of {sum(sizes)} features, got "
            f"{sizes}"
        )
    return sum(sizes)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was given this very module: its parameters are whole while it runs."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def check_whole_mlp(*tensors: Tensor, modules: Sequence[nn.Module] = ()) -> None:
    """What is cut into blocks by number must be all there."""
    if any(map(is_sharded, tensors)) or any(map(is_fully_sharded, modules)):
        raise ValueError(
            "a TailMLP, which computes blocks of its features, needs the whole weights of its "
            "Linears in each process, got sharded ones. For fully_shard: give it the whole TailMLP, "
            "or a module around it. For tensor parallelism: use to_sequential() or to_gated()"
        )


def check_whole_linear(*tensors: Tensor) -> None:
    """What has a further bias for each k must see all features."""
    if any(map(is_sharded, tensors)):
        raise ValueError(
            "a TailLinear, which has a bias for each number of its features, needs its whole input "
            "and weights in each process, got a DTensor: gather them with full_tensor(), or use "
            "fully_shard, under which they are whole while it runs"
        )


def _spans(whole: "DTensor") -> list[tuple[int, int]]:
    """Where this process's part starts along each dim, and how long it is."""
    from torch.distributed.tensor import Shard

    spans = [(0, size) for size in whole.shape]
    coordinate = whole.device_mesh.get_coordinate()
    if coordinate is None:  # this process is not among those of the mesh, and has nothing
        return [(0, 0) for _ in spans]
    for mesh_dim, placement in enumerate(whole.placements):
        kind = type(placement).__name__  # whose identity is lost in compiled code
        if kind == "Shard" and isinstance(placement, Shard):
            start, size = spans[placement.dim]
            offset, size = _chunk(size, whole.device_mesh.size(mesh_dim), coordinate[mesh_dim])
            spans[placement.dim] = start + offset, size
        elif kind not in ("Replicate", "Partial"):
            raise ValueError(
                f"the placements of a DTensor must be Shard, Replicate or Partial, got {placement}: "
                "redistribute it in front of the layer"
            )
    return spans


def _chunk(size: int, chunks: int, index: int) -> tuple[int, int]:
    """Where `torch.chunk`, and so `Shard`, has one of the chunks begin, and its size."""
    each = -(-size // chunks)
    start = min(each * index, size)
    return start, min(each, size - start)
