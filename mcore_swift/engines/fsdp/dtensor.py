"""Parameters that are whole, or parts of sharded ones (DTensor), seen alike."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: a view of its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_region(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Where this rank's part lies in the whole tensor: (start, stop) for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple((0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))


def shard_group(parameters: list[nn.Parameter]) -> dist.ProcessGroup | None:
    """The ranks that hold the other parts of this rank's parameters; None if it holds whole ones."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            group = mesh.get_group(mesh.mesh_dim_names[-1])
            return group if group.size() > 1 else None
    return None
