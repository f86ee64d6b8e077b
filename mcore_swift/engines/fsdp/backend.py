"""How a run on a transformers model starts, what it reads of a model, and its engine."""

from typing import Any

import torch

from mcore_swift.engines.fsdp import processes
from mcore_swift.engines.fsdp.engine import TransformersEngine
from mcore_swift.engines.fsdp.model import TransformersPlan, read_plan
from mcore_swift.plan.layout import Layout


def start(args: Any, layout: Layout) -> None:
    """Join the processes of the run."""
    backend = None if args.ddp_backend == "auto" else args.ddp_backend
    processes.start(seed=args.seed, timeout_s=args.ddp_timeout, backend=backend)


def stop() -> None:
    processes.stop()


def read(args: Any) -> TransformersPlan:
    """The model that `args.model` holds. Raises UserError if transformers cannot train it."""
    return read_plan(args.model)


def build(plan: TransformersPlan, layout: Layout, args: Any, dtype: torch.dtype) -> TransformersEngine:
    """The model and its optimizer; weights are random where the arguments say so, else they come afterwards."""
    return TransformersEngine(plan, layout, args, dtype, random=args.perform_initialization)
