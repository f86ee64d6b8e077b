"""How a run on megatron-core starts, what it reads of a model, and its engine."""

from typing import Any

import torch

from mcore_swift.engines.megatron import process_groups
from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.models.reading import ModelPlan, read_model
from mcore_swift.plan.layout import Layout


def start(args: Any, layout: Layout) -> None:
    """Join the processes of the run."""
    backend = None if args.ddp_backend == "auto" else args.ddp_backend
    process_groups.start(layout, seed=args.seed, timeout_s=args.ddp_timeout, backend=backend)


def stop() -> None:
    process_groups.stop()


def read(args: Any) -> ModelPlan:
    """The model that `args.model` holds. Raises UserError for a family that is not there."""
    return read_model(args.model, args.mtp_num_layers)


def build(plan: ModelPlan, layout: Layout, args: Any, dtype: torch.dtype) -> MegatronEngine:
    """The model and its optimizer; weights come afterwards. Collective."""
    return MegatronEngine(plan, layout, args, dtype)
