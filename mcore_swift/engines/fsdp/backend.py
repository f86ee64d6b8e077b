"""The backend for transformers models: implements `engines.base.Backend`."""

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
    """See `Backend.length_multiples`: sequence parallelism divides rows, whatever samples are in them."""
    return layout.cp, 1


def read(args: Any) -> TransformersPlan:
    """The description of the model in `args.model`. Raises UserError if transformers cannot train it."""
    plan = read_plan(args.model)
    if args.tuner_type == "llamapro":
        return expanded(plan, args.llamapro_num_new_blocks, args.llamapro_num_groups)
    return plan


def check(plan: TransformersPlan, args: Any, start: Path | None = None) -> None:
    """Nothing: which modules there are is known when the model is built."""


def build(
    plan: TransformersPlan, layout: Layout, args: Any, dtype: torch.dtype, start: Path | None = None
) -> TransformersEngine:
    """Build the model and its optimizer. Weights are drawn with --perform_initialization, else loaded later.

    start: the checkpoint they will be loaded from.
    """
    if start is not None and args.tuner_type not in WHOLE and not args.adapters and _continued_adapter(start):
        # that run's adapter has the settings of the folder it started from, not those of its arguments
        args = copy(args)
        args.adapters = [str(start)]
    return TransformersEngine(plan, layout, args, dtype, random=args.perform_initialization)


def _continued_adapter(checkpoint: Path) -> bool:
    """Whether the run that wrote a checkpoint was started with --adapters."""
    path = checkpoint / ARGS_FILE
    return (checkpoint / CONFIG).is_file() and path.is_file() and bool(read_args_file(path).get("adapters"))
