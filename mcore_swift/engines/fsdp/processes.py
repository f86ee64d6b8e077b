"""The processes of a run on transformers models: one process group, one mesh, one seed a rank."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines import processes


def start(*, seed: int, timeout_s: float = 600, backend: str | None = None) -> None:
    """Join the other processes of the run, as `processes.join` says, and seed this one."""
    processes.join(timeout_s=timeout_s, backend=backend)
    # Ranks have seeds of their own: each draws dropout for samples of its own.
    processes.seed_libraries(seed + dist.get_rank())


def stop() -> None:
    """Leave the process group; harmless if there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def row_group(size: int) -> dist.ProcessGroup | None:
    """The `size` neighbouring processes that share rows with this one; None if it has its rows alone. Collective."""
    if size == 1:
        return None
    own, _ = dist.new_subgroups(size)
    return own


def mesh(*, sharded: bool) -> DeviceMesh:
    """The processes as fully_shard takes them.

    sharded: all hold parts of one copy of the model `(shard,)`; else each holds a copy `(replicate, shard = 1)`,
    which is data parallelism as DDP does it.
    """
    device, size = get_accelerator().device.type, dist.get_world_size()
    if sharded or size == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size, 1), mesh_dim_names=("replicate", "shard"))
