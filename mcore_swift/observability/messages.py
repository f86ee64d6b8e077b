"""The project's logger, with other libraries quieted. Nothing changes until `configure_logging` is called."""

import logging
import os
import sys
import warnings

from ..errors import UserError

NAME = "mcore_swift"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_CHATTY = (
    "transformers",
    "datasets",
    "megatron",
    "torch",
    "matplotlib",
    "filelock",
    "fsspec",
    "urllib3",
    "PIL",
)


class _Formatter(logging.Formatter):
    """`WARNING: text`, prefixed with the rank on all ranks but 0; INFO lines show no level."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        text = super().format(record)
        return "\n".join(
            f"{self._rank}{level if not i else ''}{line}" for i, line in enumerate(text.split("\n"))
        )


class _Handler(logging.StreamHandler):
    """Writes to the current sys.stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            bar = sys.modules.get("tqdm")
            if bar is not None and sys.stderr.isatty():
                bar.tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging(rank: int | None = None, *, level: str | None = None) -> logging.Logger:
    """Set up the logger `mcore_swift` and quiet other libraries; calling it again replaces the set-up.

    A message logged with `extra={"on_all_ranks": True}` is one that every rank would log: only rank 0 prints it.

    rank: None reads RANK. Ranks other than 0 log only warnings and worse, since they would repeat rank 0.
    level: None reads LOG_LEVEL, INFO if unset; at DEBUG every rank and every library logs.
    Raises UserError for an unknown level.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    name = (level or os.environ.get("LOG_LEVEL") or "INFO").upper()
    if name not in LEVELS:
        raise UserError(f"LOG_LEVEL={name}: there is no such level", f"use one of {', '.join(LEVELS)}")
    chosen = getattr(logging, name)
    logger = logging.getLogger(NAME)
    logger.setLevel(max(chosen, logging.WARNING) if rank and chosen > logging.DEBUG else chosen)
    logger.propagate = False
    for old in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(old)
    handler = _Handler()
    handler.setFormatter(_Formatter(rank))
    if rank and chosen > logging.DEBUG:
        handler.addFilter(lambda record: not getattr(record, "on_all_ranks", False))
    logger.addHandler(handler)
    if chosen > logging.DEBUG:
        _quiet()
    return logger


def _quiet() -> None:
    """Other libraries log only errors, and do not warn about what we chose on purpose."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
