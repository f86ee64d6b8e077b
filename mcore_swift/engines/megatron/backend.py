"""How a run on megatron-core starts, what it reads of a model, and its engine."""

from pathlib import Path
from typing import Any

import torch

from converters.budget import Budget
from converters.peft_files import read_settings
from converters.ranks import Ranks
from mcore_swift.engines.megatron import process_groups
from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.models.reading import ModelPlan, read_model
from mcore_swift.plan.layout import Layout
from mcore_swift.tuners.settings import LoraSettings


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
    """The model and its optimizer; weights come afterwards, but those that an adapter leaves as they are. Collective.

    Raises UserError for an adapter to start from that is of a kind that is not supported.
    """
    adapter = _adapter(args)
    engine = MegatronEngine(plan, layout, args, dtype, adapter=adapter)
    if adapter is not None:
        engine.load_frozen(Ranks(), Budget.of(args.memory_budget))
    return engine


def _adapter(args: Any) -> LoraSettings | None:
    if args.tuner_type != "lora":
        return None
    if args.adapters:
        return read_settings(Path(args.adapters[0]))
    return LoraSettings.from_args(args)
