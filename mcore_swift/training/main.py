"""A training command in each process of a run: from arguments to the last checkpoint."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from converters.budget import Budget
from converters.pending import disk_errors
from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.config.checkpoint import size_bytes
from mcore_swift.data import PreparedData, prepare
from mcore_swift.engines.base import Backend, Engine
from mcore_swift.errors import UserError, raise_together
from mcore_swift.objectives.sft import NextToken
from mcore_swift.observability import Meter, RunLog, configure_logging
from mcore_swift.plan.layout import Layout
from mcore_swift.plan.peaks import peak_tflops
from mcore_swift.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, version_of
from mcore_swift.training.loop import Run, train
from mcore_swift.training.schedule import Schedule
from mcore_swift.training.state import TrainState

logger = logging.getLogger(__name__)


def run_training(args: Any) -> Run:
    """Train as the arguments say. Called in every process of the run; returns the finished run."""
    configure_logging()
    layout = Layout.from_args(args, int(os.environ.get("WORLD_SIZE", "1")))
    backend = backend_of(args)
    backend.start(args, layout)
    try:
        ranks = Ranks()
        run = build_run(args, layout, ranks)
        _say_what_starts(run)
        state = train(run)
        _say_what_ended(run, state)
        ranks.gather(None)  # what the first process has written is whole for all who read it now
    finally:
        backend.stop()
    return run


def backend_of(args: Any) -> Backend:
    """The module that builds the engine of `args.backend`; Megatron's if there is no such flag."""
    name = getattr(args, "backend", "megatron")
    return import_module(f"mcore_swift.engines.{_ENGINES.get(name, name)}.backend")


_ENGINES = {"ddp": "fsdp"}
"""Values of --backend that share an engine -> its name."""


def build_run(args: Any, layout: Layout, ranks: Ranks) -> Run:
    """Build data, model, optimizer and checkpoints of a run, and load what it starts from. Collective."""
    resume = _resume_from(args, ranks)
    run_dir = _choose_folder(args, resume, ranks)
    with _made_folder(run_dir, ranks):
        return _build_run(args, layout, ranks, resume, run_dir)


def _build_run(args: Any, layout: Layout, ranks: Ranks, resume: Path | None, run_dir: Path) -> Run:
    backend = backend_of(args)
    plan = backend.read(args)
    start = resume or _starts_from(args)
    backend.check(plan, args, start)
    data = _prepare_data(args, layout, plan, run_dir, ranks)
    engine = backend.build(plan, layout, args, model_dtype(args, plan), start)
    state = _fill(engine, args, data, resume, start, ranks)
    engine.begin(data.train.total_steps)
    ranks.together(lambda: _save_args(args, run_dir), where=ranks.is_first)
    budget = Budget.of(args.memory_budget)
    engine.check_budget(budget, ranks)

    def export(folder: Path) -> None:
        engine.export_hf(folder, size_bytes(args.max_shard_size), ranks, budget)

    def export_merged(folder: Path) -> None:
        engine.export_merged(folder, size_bytes(args.max_shard_size), ranks, budget)

    checkpoints = Checkpoints(
        run_dir,
        engine,
        args,
        source_dir=args.model,
        ranks=ranks,
        export_hf=export if args.save_safetensors else None,
        export_merged=export_merged if getattr(args, "merge_lora", False) else None,
        timeout_s=max(3600.0, args.ddp_timeout),
    )
    return Run(
        args=args,
        engine=engine,
        objective=NextToken(),
        data=data.train,
        validation=data.val,
        schedule=Schedule.from_args(args, data.train.total_steps),
        checkpoints=checkpoints,
        log=_open_log(args, run_dir, data, state, ranks),
        state=state,
    )


def _save_args(args: Any, run_dir: Path) -> None:
    with disk_errors(run_dir):
        args.save(run_dir)


def model_dtype(args: Any, plan: Any) -> torch.dtype:
    """Precision of the parameters: --torch_dtype, else the checkpoint's."""
    if args.torch_dtype:
        return getattr(torch, args.torch_dtype)
    stored = getattr(plan.hf, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if stored is torch.float16:
        told = "the checkpoint is in float16, which training does not support: using bfloat16"
        logger.warning(told, extra={"on_all_ranks": True})
        return torch.bfloat16
    return stored


def _resume_from(args: Any, ranks: Ranks) -> Path | None:
    """The checkpoint to continue, the same on every rank, or None for a fresh start."""
    if args.resume == "none":
        return None

    def find() -> Path | None:
        if args.resume != "auto":
            return find_checkpoint(Path(args.resume))
        with suppress(UserError):  # none there yet: a fresh start
            return find_checkpoint(Path(args.output_dir))
        return None

    return ranks.gather(ranks.together(find, where=ranks.is_first))[0]


def _choose_folder(args: Any, resume: Path | None, ranks: Ranks) -> Path:
    """The folder of logs and checkpoints: a new version in the output folder, or the folder of the resumed run."""
    output = Path(args.output_dir)
    chosen = output
    if ranks.is_first:
        if resume is not None and output.resolve() in (resume.resolve(), *resume.resolve().parents):
            chosen = resume.parent
        elif args.add_version:
            versions = [version_of(path) for path in output.glob("v*-*")]
            chosen = output / f"v{max(versions, default=-1) + 1}-{datetime.now():%Y%m%d-%H%M%S}"
    return ranks.gather(chosen)[0]


@contextmanager
def _made_folder(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Create the run's folder; if the body raises, remove it again unless it existed before.

    Each rank that fails removes it: the first one to leave has all others ended, wherever they are.
    """
    missing = ranks.gather([path for path in (run_dir, *run_dir.parents) if not path.exists()])[0]

    def make() -> None:
        with disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)

    ranks.together(make, where=ranks.is_first)
    try:
        yield
    except BaseException:
        if run_dir in missing:
            shutil.rmtree(run_dir, ignore_errors=True)
        for parent in missing[1:]:
            with suppress(OSError):  # not empty: something else was written there
                parent.rmdir()
        raise


def _prepare_data(args: Any, layout: Layout, plan: Any, run_dir: Path, ranks: Ranks) -> PreparedData:
    from transformers import AutoTokenizer

    # one builder per machine, because machines may have separate disks
    is_builder = os.environ.get("LOCAL_RANK", "0") == "0"
    data, error = None, None
    padding_multiple, segment_multiple = backend_of(args).length_multiples(layout)
    try:
        data = prepare(
            args,
            AutoTokenizer.from_pretrained(args.model),
            is_builder=is_builder,
            barrier=lambda: ranks.gather(None),
            gather=ranks.gather,
            wait_limit=args.ddp_timeout,
            output_dir=run_dir,
            padding_multiple=padding_multiple,
            segment_multiple=segment_multiple,
            uniform_shapes=layout.pp > 1,  # stages agree on the size of their messages beforehand
            model_max_length=getattr(plan.hf, "max_position_embeddings", None),
            vocab_size=getattr(plan.hf.get_text_config(), "vocab_size", None),
        )
    except UserError as raised:
        error = raised
    told = ranks.gather((is_builder, error))
    # A rank that waited for a failed builder only knows that there is nothing to read: report the builder's error.
    causes = [mistake for builder, mistake in told if builder and mistake] or [m for _, m in told if m]
    raise_together({str(cause): cause for cause in causes}.values())
    if ranks.is_first:
        for line in data.report.lines():
            logger.info(line)
    return data


def _starts_from(args: Any) -> Path | None:
    """The checkpoint whose weights or adapter a new run starts from, if any."""
    place = args.mcore_model or getattr(args, "mcore_adapter", None)
    return find_checkpoint(Path(place)) if place else None


def _fill(
    engine: Engine, args: Any, data: PreparedData, resume: Path | None, start: Path | None, ranks: Ranks
) -> TrainState:
    """Load initial weights, or everything from the resumed checkpoint; returns the state to train from."""
    if resume is not None:
        wanted = {"weights": True, "optimizer": not args.no_load_optim, "rng": not args.no_load_rng}
        parts = [part for part, is_wanted in wanted.items() if is_wanted]
        manifest = load_checkpoint(resume, engine, parts=parts, notify=logger.info)
        state = TrainState(**manifest.train_state)
        for warning in data.train.load_state_dict(state.data):
            logger.warning(warning, extra={"on_all_ranks": True})
        logger.info(f"resumed from {resume}: step {state.step}")
        return state
    if start is not None:
        load_checkpoint(start, engine, parts=["weights"], notify=logger.info)
    elif args.perform_initialization:
        engine.initialize()
        engine.after_load(["weights"], optimizer_step=0)
    else:
        told = engine.load_hf(args.model, ranks, Budget.of(args.memory_budget))
        engine.after_load(["weights"], optimizer_step=0)
        logger.info(told)
    return TrainState()


def _open_log(args: Any, run_dir: Path, data: PreparedData, state: TrainState, ranks: Ranks) -> RunLog:
    accelerator = get_accelerator()
    peak = args.device_peak_tflops or peak_tflops(accelerator.name)
    meter = Meter(
        total_steps=data.train.total_steps,
        world_size=ranks.size,
        start_step=state.step,
        peak_flops=peak * 1e12 if peak else None,
    )
    report_to = [name for name in args.report_to if name != "none"]
    return RunLog(
        run_dir,
        meter,
        is_writer=ranks.is_first,
        logging_steps=args.logging_steps,
        report_to=report_to,
        required=report_to != ["tensorboard"],
        tensorboard_dir=getattr(args, "logging_dir", None),
    )


def _say_what_starts(run: Run) -> None:
    accelerator, engine = get_accelerator(), run.engine
    logger.info(
        f"{engine.family} in {str(engine.dtype).removeprefix('torch.')} on {engine.layout} "
        f"({accelerator.name}, {accelerator.backend}, {engine.description}), "
        f"{run.data.total_steps} steps, output in {run.checkpoints.run_dir}"
    )


def _say_what_ended(run: Run, state: TrainState) -> None:
    if run.log.meter.start_step >= run.data.total_steps:
        logger.info(f"nothing to do: step {state.step} of {run.data.total_steps} was reached before")
        return
    best = (
        f"; best loss {state.best_loss:.4f} at step {state.best_step}" if state.best_loss is not None else ""
    )
    stopped = ""
    if state.step < run.data.total_steps:
        stopped = (
            f" of {run.data.total_steps}, stopped early: {state.saves_since_best} saves without a lower loss"
        )
    logger.info(
        f"done: step {state.step}{stopped}{best}; checkpoint in {run.checkpoints.run_dir / f'checkpoint-{state.step}'}"
    )
