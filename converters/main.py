"""`megatron export`: a Hugging Face checkpoint to megatron-core's, or back, and the proof that both agree."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters import stream
from converters.hf_reader import HFReader
from converters.manifest import Manifest, versions
from converters.pending import disk_errors, pending_directory
from converters.ranks import Ranks
from converters.side_files import copy_side_files
from converters.torch_dist_reader import MCoreReader
from mcore_swift.config.checkpoint import size_bytes
from mcore_swift.errors import UserError
from mcore_swift.observability import configure_logging
from mcore_swift.plan.layout import Layout

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
        if args.to_mcore:
            to_mcore(args, ranks)
        else:
            to_hf(args, ranks)
        if args.test_convert_precision:
            check_precision(args, ranks)
    return 0


def to_mcore(args: Any, ranks: Ranks) -> None:
    """--model -> --output_dir, a folder laid out like the checkpoints of a training run."""
    plan = _read_plan(args.model)
    with HFReader(args.model) as reader:
        source = f"{args.model} ({_size(reader.nbytes)})"
        dtype = _dtype(args.torch_dtype)
        with pending_directory(args.output_dir, ranks, args.exist_ok) as folder:
            ranks.agree(_made(folder / MCORE) if ranks.is_first else None)
            with Progress(f"{source} -> {args.output_dir}", reader.nbytes, ranks) as progress:
                stream.hf_to_mcore(reader, plan.table, folder / MCORE, dtype, ranks, progress)
            if ranks.is_first:
                stored = dtype or _common_dtype(reader.dtype(name) for name in reader.names)
                copy_side_files(args.model, folder, stored)
                with disk_errors(folder):
                    args.save(folder)
                Manifest(
                    holds=["weights"],
                    dtype=stored and str(stored).removeprefix("torch."),
                    family=plan.family.name,
                    versions=versions(),
                    args="args.json",
                ).write(folder)


def to_hf(args: Any, ranks: Ranks) -> None:
    """--mcore_model -> --output_dir, a Hugging Face checkpoint."""
    source_dir = hf_source(args)
    plan = _read_plan(source_dir)
    with MCoreReader(args.mcore_model) as reader:
        nbytes = sum(spec.nbytes for spec in reader.specs.values())
        source = f"{args.mcore_model} ({_size(nbytes)})"
        with (
            pending_directory(args.output_dir, ranks, args.exist_ok) as folder,
            Progress(f"{source} -> {args.output_dir}", nbytes, ranks) as progress,
        ):
            stream.mcore_to_hf(
                reader,
                plan.table,
                source_dir,
                folder,
                size_bytes(args.max_shard_size),
                _dtype(args.torch_dtype),
                ranks,
                progress,
            )


def hf_source(args: Any) -> str:
    """Where config and tokenizer come from: the checkpoint itself if it has them, else --model."""
    own = Path(args.mcore_model)
    return str(own) if (own / "config.json").is_file() else args.model


def check_precision(args: Any, ranks: Ranks) -> None:
    """Build the model in the layout asked for, load the megatron-core checkpoint, compare with transformers."""
    from converters.shard_files import read_shards
    from converters.verify import compare_logits, fixed_rows, require_equal
    from mcore_swift.models.build import build_model, pipeline_options, transformer_config
    from mcore_swift.models.shards import live_shards

    hf_dir, mcore_dir = (
        (args.model, args.output_dir) if args.to_mcore else (args.output_dir, args.mcore_model)
    )
    layout, dtype = Layout.from_args(args, ranks.size), _dtype(args.test_convert_dtype)
    plan = _read_plan(hf_dir)
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
    tokens = fixed_rows(plan.hf.vocab_size, rows, seed=args.seed)
    comparison = compare_logits(chunks, plan.hf.vocab_size, hf_dir, tokens, dtype)
    if ranks.is_first:
        print(f"{mcore_dir} against {hf_dir}: {comparison}", flush=True)
    require_equal(
        comparison, f"{args.output_dir}, made from {args.model if args.to_mcore else args.mcore_model},"
    )


class Progress:
    """Bytes done and bytes per second: a line that is rewritten on a terminal, and one at the end anywhere."""

    def __init__(self, what: str, total: int, ranks: Ranks) -> None:
        self._what, self._total, self._ranks = what, total, ranks
        self._done, self._started, self._shown = 0, time.monotonic(), 0.0

    def __call__(self, nbytes: int) -> None:
        """This rank has written so many more bytes; the others are taken to be as far."""
        self._done += nbytes
        now = time.monotonic()
        if self._ranks.is_first and sys.stderr.isatty() and now - self._shown > 0.2:
            self._shown = now
            done = min(self._done * self._ranks.size, self._total)
            rate = done / max(now - self._started, 1e-9)
            print(
                f"\r{_size(done)} of {_size(self._total)}, {_size(rate)}/s",
                end=" ",
                file=sys.stderr,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._ranks.is_first:
            return
        if sys.stderr.isatty():
            print("\r" + " " * 60, end="\r", file=sys.stderr)
        if kind is None:
            seconds = max(time.monotonic() - self._started, 1e-9)
            print(f"{self._what}: {seconds:.1f} s, {_size(self._total / seconds)}/s", flush=True)


@contextmanager
def _processes(args: Any) -> Iterator[Ranks]:
    """The processes that convert: those of torchrun, or this one. With a model, megatron-core's groups too."""
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


def _read_plan(model_dir: str) -> Any:
    from mcore_swift.models.reading import read_model

    return read_model(model_dir)


def _made(folder: Path) -> Exception | None:
    try:
        folder.mkdir()
    except OSError as error:
        return error
    return None


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def _common_dtype(dtypes: Iterator[torch.dtype]) -> torch.dtype | None:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else None
