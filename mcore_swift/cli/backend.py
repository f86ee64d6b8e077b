"""A training command of `swift` on the engine that `--backend` selects."""

import os
from typing import Any

from ..config import SwiftSftArguments, print_notice
from ..errors import UserError, raise_together


def train_on_backend(args: SwiftSftArguments) -> int:
    """Choose the engine and train. Called in every process of the run; returns the exit code."""
    from ..training import train_main

    return train_main(loop_arguments(args))


def loop_arguments(args: SwiftSftArguments) -> Any:
    """The arguments as the training loop reads them, for the processes of this run; prints which engine and why.

    Raises UserError(s) if the arguments ask the Megatron engine for something that it cannot do.
    """
    from ..plan.backend import choose_backend
    from ..plan.preflight import preflight

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % args.sequence_parallel_size:
        raise UserError(
            f"--sequence_parallel_size {args.sequence_parallel_size} does not divide the {world_size} processes",
            "start as many processes with NPROC_PER_NODE, or a multiple of it",
        )
    backend, why = choose_backend(args, world_size, _memory_of_a_process())
    if args.backend == "auto":
        print_notice(f"--backend {backend}: {why}")
    converted = args.for_loop(world_size, backend)
    if backend == "megatron":
        raise_together([*converted.problems(), *preflight(converted, world_size)])
    return converted


def _memory_of_a_process() -> float:
    """Memory of this process's device in bytes: its GPU, or its share of the host's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
