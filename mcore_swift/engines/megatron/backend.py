"""The backend for megatron-core: implements `engines.base.Backend`."""

import difflib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converters.adapters import MCORE
from converters.budget import Budget
from converters.peft_config import module_of, settings_of_checkpoint, unloadable
from converters.peft_files import PeftAdapter
from converters.ranks import Ranks
from converters.torch_dist_reader import MCoreReader
from mcore_swift.engines.megatron import process_groups
from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.errors import UserError
from mcore_swift.models.reading import ModelPlan, read_model
from mcore_swift.models.shards import ADAPTER
from mcore_swift.plan.adapter import CONFIG
from mcore_swift.plan.axes import length_multiple
from mcore_swift.plan.layout import Layout
from mcore_swift.plan.stages import prediction_rank
from mcore_swift.tuners.attach import adapter_names
from mcore_swift.tuners.beside import beside
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import adaptable_modules, chosen_modules

logger = logging.getLogger(__name__)


def start(args: Any, layout: Layout) -> None:
    """Join the processes of the run."""
    backend = None if args.ddp_backend == "auto" else args.ddp_backend
    process_groups.start(
        layout,
        seed=args.seed,
        timeout_s=args.ddp_timeout,
        backend=backend,
        prediction_rank=prediction_rank(args),
    )


def stop() -> None:
    process_groups.stop()


def length_multiples(layout: Layout) -> tuple[int, int]:
    """See `Backend.length_multiples`: context parallelism cuts rows, and the samples in them, in zigzag."""
    return length_multiple(layout), layout.segment_multiple


def read(args: Any) -> ModelPlan:
    """The description of the model in `args.model`. Raises UserError for a family that is not supported."""
    return read_model(args.model, args.mtp_num_layers)


def check(plan: ModelPlan, args: Any, start: Path | None = None) -> None:
    """Raises UserError for adapters, and modules that train whole beside them, that the model cannot have."""
    if (adapter := _adapter(args, plan, start)) is not None:
        names = adapter_names(plan.table, adapter)
        beside(plan.table, adapter)
        if start is not None:
            _refuse_other_base(start, set(names), args.model)


def build(
    plan: ModelPlan, layout: Layout, args: Any, dtype: torch.dtype, start: Path | None = None
) -> MegatronEngine:
    """Build the model and its optimizer, and load the frozen weights beside an adapter. Collective.

    All other weights are loaded later. start: the checkpoint they are loaded from. Raises UserError for an adapter
    (--adapters) of a kind that is not supported, or of another base model.
    """
    adapter = _adapter(args, plan, start)
    if adapter and start is None and args.adapters:  # for args.json, from which a resumed run takes them
        args.lora_rank, args.lora_alpha, args.lora_dropout = adapter.rank, adapter.alpha, adapter.dropout
        args.use_rslora, args.use_dora = adapter.use_rslora, adapter.use_dora
        args.modules_to_save, args.lora_bias = list(adapter.modules_to_save), adapter.bias
    engine = MegatronEngine(plan, layout, args, dtype, adapter=adapter)
    if adapter is not None:
        if reason := unloadable(chosen_modules(plan.table, adapter), dora=adapter.use_dora):
            logger.info(reason)
        engine.load_frozen(Ranks(), Budget.of(args.memory_budget))
    return engine


def _adapter(args: Any, plan: ModelPlan, start: Path | None) -> LoraSettings | None:
    """Settings of the trained adapter: those of the adapter that the run continues, else those of the command."""
    if args.tuner_type != "lora":
        return None
    if start is not None and (start / CONFIG).is_file():
        saved = settings_of_checkpoint(start, plan.table)
        return replace(saved, dropout=args.lora_dropout, seed=args.seed)
    if start is None and args.adapters:
        return _fitting(PeftAdapter(args.adapters[0], plan.table.matrices), plan)
    return LoraSettings.from_args(args)


def _refuse_other_base(start: Path, names: set[str], model: str) -> None:
    """Raise UserError unless a checkpoint holds the adapter tensors of these names and no others."""
    held = set(MCoreReader(start / MCORE, frozenset({ADAPTER.rstrip(".")})).specs)
    if not held:
        return  # a checkpoint of another engine or of a full run: reported when it is loaded
    for verb, keys in (("lacks", names - held), ("has", held - names)):
        if keys:
            modules = sorted({module_of(key) for key in keys})
            shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
            raise UserError(
                f"{start}: does not fit {model}: its adapter {verb} matrices of {shown}",
                "it is an adapter of another base model: give that one to --model",
            )


def _fitting(source: PeftAdapter, plan: ModelPlan) -> LoraSettings:
    linear = adaptable_modules(plan.table)
    unknown = sorted((source.held.modules.keys() | source.held.embeddings.keys()) - set(linear))
    if unknown:
        near = difflib.get_close_matches(unknown[0], linear, n=3, cutoff=0.4)
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UserError(
            f"{source.folder}: has adapters for layers that support none in this model: {shown}",
            "it is an adapter of another base model, or of layers that are not supported"
            + (f"; nearest names: {', '.join(near)}" if near else ""),
        )
    return source.settings
