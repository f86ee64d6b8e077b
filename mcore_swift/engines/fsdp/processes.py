"""The processes of a run on transformers models: process group, device mesh and seeds."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines import processes


def start(*, seed: int, timeout_s: float = 600, backend: str | None = None) -> None:
    """Initialize the process group (see `engines.processes.join`) and seed this process."""
    processes.join(timeout_s=timeout_s, backend=backend)
    # A different seed per rank: each draws dropout masks for its own samples.
    processes.seed_libraries(seed + dist.get_rank())


def stop() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def row_group(size: int) -> dist.ProcessGroup | None:
    """The group of `size` consecutive ranks that share rows, for this rank; None if `size` is 1. Collective."""
    if size == 1:
        return None
    own, _ = dist.new_subgroups(size)
    return own


def mesh(*, sharded: bool) -> DeviceMesh:
    """The device mesh for `fully_shard`.

    sharded: one copy of the model is sharded over all processes, mesh `(shard,)`; else each process has a replica, mesh
    `(replicate, shard = 1)`, which is data parallelism as in DDP.
    """
    device, size = get_accelerator().device.type, dist.get_world_size()
    if sharded or size == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size, 1), mesh_dim_names=("replicate", "shard"))
