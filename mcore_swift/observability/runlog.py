"""The log of a run: the interface for the training loop, and the loggers behind it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .console import ConsoleLogger
from .jsonl import FILE_NAME, JsonlLogger
from .meter import Line, Meter, eval_line
from .plot import plot_curves
from .report import StepReport
from .tensorboard import FOLDER as RUNS
from .tensorboard import TensorboardLogger, installed

_log = logging.getLogger(__name__)


class Logger(Protocol):
    """A destination of log lines."""

    def after_step(self, step: int) -> None:
        """Called for every step, logged or not."""

    def log(self, line: Line) -> None:
        """Take one line, as `Meter` makes it; it always has `step`."""

    def close(self) -> None:
        """Called once, even if the run failed."""


def make_loggers(
    folder: str | Path,
    *,
    total_steps: int,
    start_step: int = 0,
    report_to: Sequence[str] = (),
    required: bool = True,
    tensorboard_dir: str | Path | None = None,
) -> list[Logger]:
    """Loggers for the console and logging.jsonl, and for the trackers in `report_to`.

    required: whether a missing tracker raises UserError (the user named it) or only logs a warning (it is the
    default). Raises ValueError for an unknown tracker.
    """
    unknown = set(report_to) - {"tensorboard"}
    if unknown:
        raise ValueError(f"no logger for {sorted(unknown)}")
    trackers = [name for name in report_to if installed(required=required)]
    loggers: list[Logger] = [
        ConsoleLogger(total_steps=total_steps, start_step=start_step),
        JsonlLogger(folder, start_step=start_step),
    ]
    place = Path(tensorboard_dir) if tensorboard_dir else Path(folder) / RUNS
    return loggers + [TensorboardLogger(place, start_step=start_step) for _ in trackers]


class RunLog:
    """Meters every step and writes a line at step 1, every `logging_steps` steps and at the end.

    Only the rank with `is_writer` writes; on other ranks all calls do nothing. Use it as a context manager: on exit,
    also after an error, it writes what is left, draws the curves and closes the files.

    folder: the run's own folder; logging.jsonl, runs/ and images/ go there. tensorboard_dir: used instead of runs/.
    make: creates the loggers; replaced in tests.
    """

    def __init__(
        self,
        folder: str | Path,
        meter: Meter,
        *,
        is_writer: bool,
        logging_steps: int = 5,
        report_to: Sequence[str] = (),
        required: bool = True,
        tensorboard_dir: str | Path | None = None,
        make: Callable[..., list[Logger]] = make_loggers,
    ) -> None:
        self.folder = Path(folder)
        self.meter = meter
        self.is_writer = is_writer
        self.logging_steps = logging_steps
        self._loggers: list[Logger] = []
        if is_writer:
            self._loggers = make(
                folder,
                total_steps=meter.total_steps,
                start_step=meter.start_step,
                report_to=report_to,
                required=required,
                **({"tensorboard_dir": tensorboard_dir} if tensorboard_dir else {}),
            )

    def after_step(self, report: StepReport) -> Line | None:
        """Take the report of a step; returns the line, if one was due."""
        if not self.is_writer:
            return None
        self.meter.add(report)
        for logger in self._loggers:
            logger.after_step(report.step)
        return self._write(self.meter.line()) if self.is_due(report.step) else None

    def is_due(self, step: int) -> bool:
        """Whether `after_step` writes a line at this step; the same on every rank."""
        return step == 1 or step % self.logging_steps == 0 or step == self.meter.total_steps

    def after_eval(self, step: int, metrics: Mapping[str, float]) -> Line | None:
        """Log validation metrics (`loss` becomes `eval_loss`) as a separate line, which is returned."""
        if not self.is_writer:
            return None
        return self._write(eval_line(metrics) | self.meter.position(step))

    def close(self) -> list[Path]:
        """Write the steps not yet logged, close everything, draw the curves; returns the images."""
        if not self.is_writer or not self._loggers:
            return []
        try:
            if not self.meter.empty:
                self._write(self.meter.line())
        finally:
            loggers, self._loggers = self._loggers, []
            for logger in loggers:
                logger.close()
        log_file = self.folder / FILE_NAME
        return plot_curves(log_file, self.folder) if log_file.exists() else []

    def _write(self, line: Line) -> Line:
        for logger in self._loggers:
            logger.log(line)
        return line

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except Exception:  # the first error matters more
            _log.warning("the log could not be closed cleanly", exc_info=True)
