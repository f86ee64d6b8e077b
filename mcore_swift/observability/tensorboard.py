"""Scalars for TensorBoard, under `train/` and `eval/`."""

import importlib.util
import logging
from pathlib import Path

from ..errors import UserError
from .meter import Line

FOLDER = "runs"
_REMEDY = "pip install 'mcore-swift[tracking]', or use --report_to none"
_log = logging.getLogger(__name__)


def installed(*, required: bool) -> bool:
    """Whether tensorboard is installed. If it is required and missing, raises a UserError that names the extra."""
    if importlib.util.find_spec("tensorboard"):
        return True
    if required:
        raise UserError("--report_to tensorboard: tensorboard is not installed", _REMEDY)
    _log.warning("tensorboard is not installed, so there are no event files (%s)", _REMEDY)
    return False


class TensorboardLogger:
    """Writes event files to `folder`. A crashed run's scalars after `start_step` are hidden."""

    def __init__(self, folder: str | Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def after_step(self, step: int) -> None:
        pass

    def log(self, line: Line) -> None:
        step = int(line["step"])
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(tag_of(name), value, step)

    def close(self) -> None:
        self._writer.close()


def tag_of(name: str) -> str:
    """loss -> train/loss, eval_loss -> eval/loss; a name with a group keeps it."""
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    return name if "/" in name and "(" not in name else f"train/{name}"
