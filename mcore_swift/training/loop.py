"""The training loop."""

import gc
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mcore_swift.accelerator import get_accelerator
from mcore_swift.data import EvalSteps, Prefetcher, Steps
from mcore_swift.data.streaming.steps import StreamedSteps
from mcore_swift.engines.base import Engine, StepResult
from mcore_swift.errors import TrainingStopped
from mcore_swift.objectives.base import Objective
from mcore_swift.observability import Limit, RunLog, StepReport
from mcore_swift.training.checkpoint import Checkpoints
from mcore_swift.training.schedule import Schedule
from mcore_swift.training.state import TrainState


@dataclass
class Run:
    """Everything a training run consists of."""

    args: Any
    engine: Engine
    objective: Objective
    data: Steps | StreamedSteps
    validation: EvalSteps | None
    schedule: Schedule
    checkpoints: Checkpoints
    log: RunLog
    state: TrainState


def train(run: Run) -> TrainState:
    """Train from `run.state` to the last step, or until `--early_stop_interval` is reached; returns the final state.

    Raises TrainingStopped, naming the step, if the loss or the gradient is not finite; that step is not saved.
    """
    state = run.state
    with (
        _garbage(run.args),
        run.log,
        _prefetch(run, run.data, state.step, run.data.total_steps) as batches,
        closing(run.data),
    ):
        started = time.perf_counter()
        for step, microbatches in batches:
            lr, weight_decay = run.schedule.lr(step), run.schedule.weight_decay(step)
            with (
                Limit(f"training step {step + 1}", 2 * run.args.ddp_timeout),
                _divergence_named(run, step + 1),
            ):
                result = run.engine.train_step(microbatches, run.objective, lr=lr, weight_decay=weight_decay)
            state.step = step + 1
            state.consumed_samples = run.data.consumed(state.step)
            now = time.perf_counter()
            _report(run, result, lr, seconds=now - started, data_wait=batches.wait_seconds)
            _collect(run.args, state.step)
            if _evaluate_and_save(run) and state.has_stalled(run.args.early_stop_interval):
                break
            started = time.perf_counter()
        run.checkpoints.poll(wait=True)
    return state


@contextmanager
def _divergence_named(run: Run, step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        # All ranks get here, so a background save can be finished: it is the one to resume from.
        run.checkpoints.poll(wait=True)
        raise TrainingStopped(
            f"step {step} of the run in {run.checkpoints.run_dir}: {error}",
            remedy="resume from the newest checkpoint with a lower learning rate or a longer warm-up, and look at the "
            "data",
        ) from None


def evaluate(run: Run) -> StepResult:
    """Mean loss and metrics per token over the validation set, or over its first `eval_iters` global batches."""
    steps = run.validation.total_steps
    if run.args.eval_iters > 0:
        steps = min(steps, run.args.eval_iters)
    with _prefetch(run, run.validation, 0, steps) as batches:
        return StepResult.mean(
            run.engine.evaluate_step(microbatches, run.objective) for _, microbatches in batches
        )


def _evaluate_and_save(run: Run) -> bool:
    """Evaluate and save if they are due; returns whether a checkpoint was saved."""
    state = run.state
    save_is_due = state.step == run.data.total_steps or _save_is_due(run)
    if _evaluation_is_due(run, save_is_due):
        if run.args.manual_gc and run.args.manual_gc_eval:
            gc.collect()
        result = evaluate(run)
        loss = result.loss
        run.log.after_eval(state.step, {"loss": loss} | result.metrics)
        if save_is_due:
            state.judge(loss)
    if save_is_due:
        state.data = run.data.state_dict(state.step)
        run.checkpoints.save(state)
    else:
        run.checkpoints.poll()
    return save_is_due


def _evaluation_is_due(run: Run, save_is_due: bool) -> bool:
    if run.validation is None or run.args.eval_iters == 0:
        return False
    step, by_epoch = run.state.step, run.args.save_strategy == "epoch" and not run.args.eval_steps
    if step == run.data.total_steps or (by_epoch and save_is_due):
        return True
    return not by_epoch and step % (run.args.eval_steps or run.args.save_steps) == 0


def _save_is_due(run: Run) -> bool:
    step = run.state.step
    if run.args.save_strategy == "epoch":
        return int(run.data.epoch(step)) > int(run.data.epoch(step - 1))
    return step % run.args.save_steps == 0


def _prefetch(run: Run, data: Any, start: int, stop: int) -> Prefetcher:
    def make(step: int) -> list[Any]:
        return data.step(step, run.engine.dp_rank, run.engine.layout.dp)

    args = run.args
    workers, ahead = args.dataloader_num_workers, args.dataloader_prefetch_factor
    return Prefetcher(make, start, stop, workers=workers, ahead=ahead, limit=args.ddp_timeout)


def _report(run: Run, result: StepResult, lr: float, *, seconds: float, data_wait: float) -> None:
    state, info = run.state, run.data.info(run.state.step - 1)
    peak = get_accelerator().memory_peak_bytes()
    if run.log.is_due(state.step):  # the same step on every rank: report the slowest and the fullest rank
        seconds, data_wait, peak = _largest(seconds, data_wait, peak)
    padding = info.padding_share
    run.log.after_step(
        StepReport(
            step=state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=lr,
            tokens=info.num_tokens,
            loss_count=result.count,
            padded_tokens=round(info.num_tokens * padding / (1 - padding)),
            samples=info.num_samples,
            flops=run.engine.training_flops(info.num_tokens, info.sum_of_squares),
            step_time_s=seconds,
            data_wait_s=data_wait,
            phases_s=result.phases_s,
            memory_peak_bytes=int(peak),
            metrics=result.metrics,
            consumed_samples=state.consumed_samples,
            epoch=run.data.epoch(state.step),
        )
    )


def _largest(*values: float) -> list[float]:
    """The maximum of each value over all ranks. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=get_accelerator().device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


@contextmanager
def _garbage(args: Any) -> Iterator[None]:
    """With `--manual_gc`, disable automatic garbage collection: all ranks collect in the same step (`_collect`)."""
    if not args.manual_gc:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _collect(args: Any, step: int) -> None:
    if args.manual_gc and args.manual_gc_steps and step % args.manual_gc_steps == 0:
        gc.collect()
