"""How a run on a transformers model starts, what it reads of a model, and its engine."""

from copy import copy
from pathlib import Path
from typing import Any

import torch

from mcore_swift.config import ARGS_FILE
from mcore_swift.config.base import read_args_file
from mcore_swift.engines.fsdp import processes
from mcore_swift.engines.fsdp.block_expansion import expanded
from mcore_swift.engines.fsdp.engine import WHOLE, TransformersEngine
from mcore_swift.engines.fsdp.model import TransformersPlan, read_plan
from mcore_swift.plan.adapter import CONFIG
from mcore_swift.plan.layout import Layout


def start(args: Any, layout: Layout) -> None:
    """Join the processes of the run."""
    backend = None if args.ddp_backend == "auto" else args.ddp_backend
    processes.start(seed=args.seed, timeout_s=args.ddp_timeout, backend=backend)


def stop() -> None:
    processes.stop()


def length_multiples(layout: Layout) -> tuple[int, int]:
    """What rows, and samples in rows of several, are padded to: only whole rows are cut."""
    return layout.cp, 1


def read(args: Any) -> TransformersPlan:
    """The model that `args.model` holds. Raises UserError if transformers cannot train it."""
    plan = read_plan(args.model)
    if args.tuner_type == "llamapro":
        return expanded(plan, args.llamapro_num_new_blocks, args.llamapro_num_groups)
    return plan


def build(
    plan: TransformersPlan, layout: Layout, args: Any, dtype: torch.dtype, start: Path | None = None
) -> TransformersEngine:
    """The model and its optimizer; weights are random where the arguments say so, else they come afterwards.

    start: the checkpoint whose weights will come.
    """
    if start is not None and args.tuner_type not in WHOLE and not args.adapters and _went_on(start):
        # the adapter is not the one that the arguments describe, but the one that run began with
        args = copy(args)
        args.adapters = [str(start)]
    return TransformersEngine(plan, layout, args, dtype, random=args.perform_initialization)


def _went_on(checkpoint: Path) -> bool:
    """Whether the run that wrote a checkpoint began with somebody's adapter."""
    path = checkpoint / ARGS_FILE
    return (checkpoint / CONFIG).is_file() and path.is_file() and bool(read_args_file(path).get("adapters"))
