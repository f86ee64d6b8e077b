"""Turns step reports into a log line: means over the steps since the last line, and rates."""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from .report import StepReport

GIB = 1024**3

Line = dict[str, float | int | str]


class Meter:
    """Collects step reports and turns them into log lines.

    Losses and metrics are weighted by the number of terms that they average, so that a line over several steps equals
    the loss over all their tokens at once. Rates use the time of the steps alone; `elapsed_time` and
    `remaining_time` are wall time of this process, saves and evaluations included.

    total_steps: the last step of the run.
    world_size: devices that work on a step.
    start_step: the step resumed from.
    peak_flops: peak FLOP/s of one device in the training precision; without it there is no `mfu`.
    clock: a monotonic clock in seconds; replaced in tests.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        world_size: int,
        start_step: int = 0,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.world_size = world_size
        self.start_step = start_step
        self.peak_flops = peak_flops
        self._clock = clock
        self._started = clock()
        self._window: list[StepReport] = []

    @property
    def empty(self) -> bool:
        """Whether no step was added since the last line."""
        return not self._window

    def add(self, report: StepReport) -> None:
        self._window.append(report)

    def line(self) -> Line:
        """The log line of the steps added since the last call. Raises ValueError when there are none."""
        if self.empty:
            raise ValueError("no step was added since the last line")
        window, self._window = self._window, []
        last = window[-1]
        return {
            **_curve(window),
            "learning_rate": last.learning_rate,
            **self.position(last.step),
            "epoch": last.epoch,
            "consumed_samples": last.consumed_samples,
            "memory(GiB)": _short(max(report.memory_peak_bytes for report in window) / GIB),
            **_rates(window, self.world_size, self.peak_flops),
            **_phases(window),
        }

    def position(self, step: int) -> Line:
        """Where the run is after `step`, under ms-swift's names and as the plain number `step`."""
        elapsed = self._clock() - self._started
        done = step - self.start_step
        line: Line = {
            "step": step,
            "iteration": f"{step}/{self.total_steps}",
            "global_step/max_steps": f"{step}/{self.total_steps}",
            "percentage": f"{100 * step / max(1, self.total_steps):.2f}%",
            "elapsed_time": format_duration(elapsed),
        }
        if done > 0:
            line["remaining_time"] = format_duration(elapsed / done * max(0, self.total_steps - step))
        return line


def _curve(window: list[StepReport]) -> Line:
    """Loss, gradient norm and metrics. Skipped steps count only if there are no others."""
    steps = [report for report in window if not report.skipped] or window
    line: Line = {"loss": weighted_mean((report.loss, _weight(report)) for report in steps)}
    norms = [report.grad_norm for report in steps if report.grad_norm is not None]
    if norms:
        line["grad_norm"] = sum(norms) / len(norms)
    for name in dict.fromkeys(name for report in steps for name in report.metrics):
        having = [report for report in steps if name in report.metrics]
        line[name] = weighted_mean((report.metrics[name], _weight(report)) for report in having)
    zeros = [report.num_zeros for report in steps if report.num_zeros is not None]
    if zeros:
        line["num_zeros_in_grad"] = zeros[-1]
    skipped = sum(report.skipped for report in window)
    if skipped:
        line["skipped_steps"] = skipped
    return line


def _rates(window: list[StepReport], world_size: int, peak_flops: float | None) -> Line:
    """Speed and waste of the window.

    MFU is model FLOP/s over peak FLOP/s (PaLM, arXiv:2204.02311, appendix B).
    """
    seconds = max(sum(report.step_time_s for report in window), 1e-9)
    tokens = sum(report.tokens for report in window)
    padded = sum(report.padded_tokens for report in window)
    wait = sum(report.data_wait_s for report in window)
    flops_per_device = sum(report.flops for report in window) / seconds / world_size
    line: Line = {
        "train_speed(s/it)": _short(seconds / len(window)),
        "tokens_per_s": _short(tokens / seconds),
        "tokens_per_s_per_device": _short(tokens / seconds / world_size),
        "tflops_per_device": _short(flops_per_device / 1e12),
    }
    if peak_flops:
        line["mfu"] = _short(flops_per_device / peak_flops)
    return line | {
        "data_wait_s": _short(wait / len(window)),
        "data_wait_share": _short(wait / seconds),
        "padding_share": _short(padded / max(1, padded + tokens)),
    }


def _phases(window: list[StepReport]) -> Line:
    """Seconds per step of each phase, as `time/<phase>`."""
    totals: dict[str, float] = {}
    for report in window:
        for phase, seconds in report.phases_s.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return {f"time/{phase}": _short(seconds / len(window)) for phase, seconds in totals.items()}


def weighted_mean(values: Iterable[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs; plain mean when all weights are zero. NaN when there are none."""
    pairs = list(values)
    if not pairs:
        return math.nan
    if len(pairs) == 1:  # exactly the value, which v * w / w need not be
        return pairs[0][0]
    total = sum(weight for _, weight in pairs)
    if total == 0:
        return sum(value for value, _ in pairs) / len(pairs)
    return sum(value * weight for value, weight in pairs) / total


def eval_line(metrics: Mapping[str, float]) -> Line:
    """Evaluation metrics under their logged names: loss becomes eval_loss."""
    return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()}


def format_duration(seconds: float) -> str:
    """Seconds as '1d 2h 3m 4s', without leading zeros."""
    rest = max(0, round(seconds))
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join([*parts, f"{rest}s"])


def _weight(report: StepReport) -> float:
    return report.tokens if report.loss_count is None else report.loss_count


def _short(value: float) -> float:
    """Six significant digits: enough for a rate, and a line stays readable."""
    return float(f"{value:.6g}")
