"""The processes of a run on transformers models: one process group, one mesh, one seed a rank."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mcore_swift.accelerator import get_accelerator


def start(*, seed: int, timeout_s: float = 600, backend: str | None = None) -> None:
    """Join the other processes of the run and seed this one.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them it is a run of one process. A collective
    that does not finish within `timeout_s` seconds raises instead of hanging.
    """
    accelerator = get_accelerator()
    if not dist.is_initialized():
        if "RANK" in os.environ:
            where = {"init_method": "env://"}
        else:
            where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            backend or accelerator.backend,
            timeout=timedelta(seconds=timeout_s),
            device_id=accelerator.device if accelerator.is_cuda else None,
            **where,
        )
    seed_everything(seed + dist.get_rank())


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Ranks have seeds of their own: each draws dropout for samples of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def stop() -> None:
    """Leave the process group; harmless if there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh(*, sharded: bool) -> DeviceMesh:
    """The processes as fully_shard takes them.

    sharded: all hold parts of one copy of the model `(shard,)`; else each holds a copy `(replicate, shard = 1)`,
    which is data parallelism as DDP does it.
    """
    device, size = get_accelerator().device.type, dist.get_world_size()
    if sharded or size == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size, 1), mesh_dim_names=("replicate", "shard"))
