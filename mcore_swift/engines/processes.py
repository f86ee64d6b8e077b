"""Joining the process group and seeding random generators, for every engine."""

import itertools
import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from mcore_swift.accelerator import get_accelerator
from mcore_swift.errors import UserError


def join(*, timeout_s: float, backend: str | None = None) -> None:
    """Initialize the default process group, unless that has been done.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without RANK the group has one process. A collective that does
    not finish within `timeout_s` seconds raises instead of hanging. Raises UserError for a library that is not there.
    """
    if dist.is_initialized():
        return
    accelerator = get_accelerator()
    if backend == "nccl" and not (accelerator.is_cuda and dist.is_nccl_available()):
        raise UserError(
            "--ddp_backend nccl needs a GPU and a torch that is built for it",
            "use --ddp_backend auto, which takes gloo here; `mcore-swift doctor` says what this machine can run",
        )
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend or accelerator.backend,
        timeout=timeout,
        device_id=accelerator.device if accelerator.is_cuda else None,
        store=dist.HashStore() if world_size == 1 else _meeting_place(timeout),
        rank=rank,
        world_size=world_size,
    )


_stores: dict[tuple[str, ...], dist.Store] = {}
_meetings = itertools.count()


def _meeting_place(timeout: timedelta) -> dist.Store:
    """Where the processes of the environment find each other: one server for all runs of these processes.

    Each run has keys of its own, so that none reads the addresses of an earlier one, and the port is not taken twice.
    """
    where = tuple(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if where not in _stores:
        _stores[where] = next(dist.rendezvous("env://", timeout=timeout))[0]
    return dist.PrefixStore(f"run-{next(_meetings)}", _stores[where])


def seed_libraries(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
