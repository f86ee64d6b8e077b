"""Joining the process group and seeding random generators, for every engine."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mcore_swift.accelerator import get_accelerator


def join(*, timeout_s: float, backend: str | None = None) -> None:
    """Initialize the default process group, unless that has been done.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without RANK the group has one process. A collective that does
    not finish within `timeout_s` seconds raises instead of hanging.
    """
    if dist.is_initialized():
        return
    accelerator = get_accelerator()
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


def seed_libraries(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
