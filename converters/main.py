"""`megatron export`: converts a Hugging Face checkpoint to megatron-core's format or back, and compares the logits.

An adapter given with either is merged while the weights are read, or converted alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from converters import stream
from converters.adapters import convert_adapter, open_adapter
from converters.attempt import identity
from converters.budget import Budget
from converters.hf_reader import HFReader
from converters.journal import Journal
from converters.manifest import FILE_NAME as MANIFEST
from converters.manifest import Manifest, versions
from converters.pending import disk_errors, pending_directory
from converters.progress import Shown, size
from converters.ranks import Ranks
from converters.side_files import copy_side_files
from converters.torch_dist_reader import MCoreReader
from converters.views import HFView, MergedView, NamedWeights, View
from mcore_swift.config.checkpoint import size_bytes
from mcore_swift.errors import UserError
from mcore_swift.observability import configure_logging
from mcore_swift.plan.axes import length_multiple
from mcore_swift.plan.layout import Layout

if TYPE_CHECKING:
    from mcore_swift.models.reading import ModelPlan

MCORE = "mcore"
ROWS = 4


def export_main(args: Any) -> int:
    """Run `megatron export` in this process, one of WORLD_SIZE. Returns the exit code.

    args: MegatronExportArguments. The conversion needs no layout and no model; `test_convert_precision` builds
    the model in the layout asked for.
    Raises UserError, on every rank, for a checkpoint that is broken or does not fit its config, an output
    folder that is in the way, a full disk, or logits that differ.
    """
    configure_logging()
    with _processes(args) as ranks:
        export(args, ranks)
    return 0


def export(args: Any, ranks: Ranks) -> None:
    """`export_main` in processes that have already joined. Collective."""
    if args.adapter and not args.merge_lora:
        model = _read_plan(hf_source(args), args.mtp_num_layers)
        adapter = open_adapter(args.adapter, model.table)
        convert_adapter(adapter, model.table, args, ranks, model.family.name, to_mcore=args.to_mcore)
        return
    convert(args, ranks)
    if args.test_convert_precision:
        check_precision(args, ranks)


@dataclass(frozen=True)
class Source:
    """The input of a conversion: an open checkpoint under megatron-core's keys, and its model.

    description: the folder with config.json.
    """

    folder: str
    description: str
    view: View
    model: "ModelPlan"


@contextmanager
def open_source(args: Any) -> Iterator[Source]:
    """Open --mcore_model, else --model, with the adapter merged if one is given. Raises UserError if it is broken."""
    description = hf_source(args)
    model = _read_plan(description, args.mtp_num_layers)
    with _open_weights(args, model) as view:
        if args.adapter:
            view = MergedView(view, model.table, open_adapter(args.adapter, model.table))
        yield Source(args.adapter or args.mcore_model or args.model, description, view, model)


@contextmanager
def _open_weights(args: Any, model: "ModelPlan") -> Iterator[View]:
    staging = Budget.of(args.memory_budget).staging
    if args.mcore_model is None:
        with HFReader(args.model, staging) as reader:
            yield HFView(reader, model.table)
    elif named_by_transformers(args.mcore_model):
        place = Path(args.mcore_model) / MCORE
        with NamedWeights(place, model.table, staging) as reader:
            yield HFView(reader, model.table.matrices.as_held(reader.shapes))
    else:
        with MCoreReader(args.mcore_model, staging_bytes=staging) as reader:
            yield reader


def named_by_transformers(folder: str) -> bool:
    """Whether the engine for transformers models wrote the checkpoint."""
    return (Path(folder) / MANIFEST).is_file() and Manifest.read(folder).engine == "fsdp"


def plan_of(args: Any, source: Source, processes: int) -> stream.MCorePlan | stream.HFPlan:
    """Who writes what. Raises UserError if checkpoint and model do not fit, or the memory budget is too small."""
    table, dtype, budget = source.model.table, _dtype(args.torch_dtype), Budget.of(args.memory_budget)
    if args.to_mcore:
        return stream.plan_mcore(source.view, table, dtype, processes, budget)
    shard = size_bytes(args.max_shard_size)
    return stream.plan_hf(source.view, table, shard, dtype, processes, budget)


def convert(args: Any, ranks: Ranks) -> None:
    """--model or --mcore_model, and the adapter beside it -> --output_dir. Collective.

    A folder in torch_dist format is laid out like the checkpoints of a training run.
    """
    with open_source(args) as source:
        plan = plan_of(args, source, ranks.size)
        with _unfinished(args, ranks, plan, source) as (folder, journal, progress):
            if args.to_mcore:
                stream.write_mcore(source.view, plan, folder / MCORE, ranks, progress, journal)
            else:
                stream.write_hf(source.view, plan, source.description, folder, ranks, progress, journal)
            journal.close()
            if args.to_mcore and ranks.is_first:
                _describe(args, source, plan, folder)


def _describe(args: Any, source: Source, plan: stream.MCorePlan, folder: Path) -> None:
    """What a torch_dist folder of weights needs beside them."""
    dtypes = {spec.dtype for spec in plan.specs}
    stored = dtypes.pop() if len(dtypes) == 1 else None
    copy_side_files(source.description, folder, stored, source.model.table.config)
    with disk_errors(folder):
        args.save(folder)
    Manifest(
        holds=["weights"],
        dtype=stored and str(stored).removeprefix("torch."),
        family=source.model.family.name,
        versions=versions(),
        args="args.json",
    ).write(folder)


@contextmanager
def _unfinished(
    args: Any, ranks: Ranks, plan: stream.MCorePlan | stream.HFPlan, source: Source
) -> Iterator[tuple[Path, Journal, Shown]]:
    """The folder that becomes --output_dir, this process's journal in it, and the progress. Collective.

    Finished pieces of an earlier, interrupted attempt of the same conversion are kept if their checksums match.
    """
    what = f"{source.folder} ({size(source.view.nbytes)}) -> {args.output_dir}"
    attempt = identity(plan, source.view.files)
    with pending_directory(args.output_dir, ranks, args.exist_ok, attempt) as folder:
        weights = folder / MCORE if args.to_mcore else folder
        ranks.together(lambda: weights.mkdir(exist_ok=True), where=ranks.is_first)
        journal = ranks.together(lambda: Journal(weights, ranks.rank))
        kept = sum(ranks.gather(journal.nbytes))
        if kept and ranks.is_first:
            print(f"{args.output_dir}: {size(kept)} that an earlier attempt wrote are kept", flush=True)
        with Shown(what, ranks) as progress:
            yield folder, journal, progress


def hf_source(args: Any) -> str:
    """Where config and tokenizer come from: the megatron-core checkpoint if it has them, else --model."""
    own = Path(args.mcore_model or args.model)
    return str(own) if (own / "config.json").is_file() else args.model


def check_precision(args: Any, ranks: Ranks) -> None:
    """Build the model in the layout asked for, load the megatron-core checkpoint, compare with transformers."""
    from converters.layers import compare_layers
    from converters.shard_files import read_shards
    from converters.verify import ROW_LENGTH, compare_logits, fixed_rows, require_equal
    from mcore_swift.data.batch import padded_length
    from mcore_swift.models.build import build_model, pipeline_options, transformer_config
    from mcore_swift.models.shards import live_shards

    hf_dir, mcore_dir = (
        (args.model, args.output_dir) if args.to_mcore else (args.output_dir, args.mcore_model)
    )
    layout, dtype = Layout.from_args(args, ranks.size), _dtype(args.test_convert_dtype)
    plan = _read_plan(hf_dir, args.mtp_num_layers)
    config = transformer_config(plan, layout, dtype, pipeline_options(plan, layout, args))
    chunks = build_model(plan, config, args.transformer_impl)
    with MCoreReader(mcore_dir) as reader:
        folder = reader.folder
    missing = read_shards(folder, live_shards(chunks))
    if missing:
        raise UserError(
            f"{mcore_dir} does not hold {', '.join(missing[:5])}", "it is another model's checkpoint"
        )
    rows = -(-ROWS // layout.pp) * layout.pp
    length = padded_length(ROW_LENGTH, length_multiple(layout))
    tokens = fixed_rows(plan.hf.vocab_size, rows, length, seed=args.seed)
    stored = _dtype(args.torch_dtype) if args.to_mcore else None
    comparison = compare_logits(chunks, plan.hf.vocab_size, hf_dir, tokens, dtype, stored)
    if ranks.is_first:
        print(f"{mcore_dir} against {hf_dir}: {comparison}", flush=True)
    if comparison.passes:
        return
    source = args.model if args.to_mcore else args.mcore_model
    what = f"{args.output_dir}, made from {source},"
    if layout.cp > 1:  # each rank has other tokens of the row
        require_equal(comparison, what, "without context parallelism it would be said which layer differs")
    layers = compare_layers(chunks, plan.hf.vocab_size, hf_dir, tokens, dtype, stored)
    if ranks.is_first:
        print("\n".join(layers.lines()), flush=True)
    require_equal(comparison, what, layers.verdict)


@contextmanager
def _processes(args: Any) -> Iterator[Ranks]:
    """The processes that convert: those of torchrun, or this one. With a model, megatron-core's groups too."""
    if dist.is_initialized():  # the caller's, who ends them
        yield Ranks()
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.test_convert_precision:
        from mcore_swift.engines.megatron.process_groups import start

        start(Layout.from_args(args, size), seed=args.seed, timeout_s=args.ddp_timeout)
    elif size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.ddp_timeout))
    try:
        yield Ranks()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _read_plan(model_dir: str, multi_token_layers: int | None) -> Any:
    from mcore_swift.models.reading import read_model

    return read_model(model_dir, multi_token_layers)


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None
