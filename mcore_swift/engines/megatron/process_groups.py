"""Starting and ending the process groups of a run, and its random number generators."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mcore_swift.accelerator import get_accelerator
from mcore_swift.plan.layout import Layout


def start(layout: Layout, *, seed: int, timeout_s: float = 600, backend: str | None = None) -> None:
    """Join the other processes of the run and seed this one.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them it is a run of one process. A collective
    that does not finish within `timeout_s` seconds raises instead of hanging.
    """
    accelerator = get_accelerator()
    accelerator.install()
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
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        # A second set of groups, which nothing here uses, would only take time to connect.
        create_gloo_process_groups=False,
    )
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's per-rank generators.

    Pipeline stages draw different numbers (dropout of different layers), and so do data- and context-parallel ranks
    (dropout of different tokens). Tensor-parallel ranks draw the same ones outside parallel regions and others
    inside, which is megatron-core's part.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    seed += 1_000_000 * parallel_state.get_data_parallel_rank(with_context_parallel=True)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def stop() -> None:
    """Leave the process groups; harmless if there are none."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
