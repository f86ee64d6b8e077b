"""What a run reports about itself: step reports, log lines, logging.jsonl, tensorboard, curves, limits on waits.

Imports torch and trackers only when they are used.
"""

from .jsonl import JsonlLogger, read_rows
from .memory import host_memory_bytes, host_memory_peak_bytes, reset_host_memory_peak
from .messages import configure_logging
from .meter import Meter, format_duration
from .phases import PhaseTimer
from .plot import plot_curves
from .report import StepReport
from .runlog import Logger, RunLog, make_loggers
from .watchdog import Limit

__all__ = [
    "JsonlLogger",
    "Limit",
    "Logger",
    "Meter",
    "PhaseTimer",
    "RunLog",
    "StepReport",
    "configure_logging",
    "format_duration",
    "host_memory_bytes",
    "host_memory_peak_bytes",
    "make_loggers",
    "plot_curves",
    "read_rows",
    "reset_host_memory_peak",
]
