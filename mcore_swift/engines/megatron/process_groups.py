"""megatron-core's process groups and random number generators."""

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines import processes
from mcore_swift.plan.layout import Layout


def start(
    layout: Layout,
    *,
    seed: int,
    timeout_s: float = 600,
    backend: str | None = None,
    prediction_rank: int | None = None,
) -> None:
    """Initialize the process groups of a layout (see `engines.processes.join`) and seed this process.

    prediction_rank: the pipeline rank with the multi-token layers, and thus a copy of the embedding, if not the last.
    """
    get_accelerator().install()
    processes.join(timeout_s=timeout_s, backend=backend)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        # nothing here uses gloo groups beside the default ones, and they take time to connect
        create_gloo_process_groups=False,
        get_embedding_ranks=None
        if prediction_rank is None
        else lambda ranks: [ranks[0], ranks[prediction_rank]],
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
    processes.seed_libraries(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def stop() -> None:
    """Destroy the process groups, if there are any."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
