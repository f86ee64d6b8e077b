"""Logging and evaluation."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg


@dataclasses.dataclass(kw_only=True)
class ReportArguments(Arguments):
    TITLE: ClassVar[str] = "Logging"

    logging_steps: int = arg(5, "number of steps between log lines", at_least=1)
    report_to: list[str] = arg(
        ["tensorboard"],
        "where metrics are reported besides the terminal and logging.jsonl",
        choices=("tensorboard", "none"),
        refused=dict.fromkeys(("wandb", "swanlab", "all"), "only tensorboard is supported yet"),
    )
    logging_dir: str | None = arg(
        None, "folder for tensorboard files", default_text="runs/ in the folder of the run"
    )
    device_peak_tflops: float | None = arg(
        None,
        "peak TFLOP/s of a device in the training precision, to compute MFU on devices that are not in our table",
        above=0,
        default_text="from the name of the device",
    )

    def fill(self) -> None:
        if self.report_to == ["none"]:
            self.report_to = []

    def check(self) -> Iterator[UserError]:
        if "none" in self.report_to:
            yield UserError("--report_to combines none with others", "give none alone, or leave it out")


@dataclasses.dataclass(kw_only=True)
class EvaluationArguments(Arguments):
    TITLE: ClassVar[str] = "Evaluation"

    eval_steps: int | None = arg(
        None, "steps between evaluations on the validation set", at_least=1, default_text="--save_steps"
    )
    early_stop_interval: int | None = arg(
        None,
        "stop after this many saves in a row without a lower validation loss than that of the best checkpoint",
        at_least=1,
        default_text="train to the last step",
    )

    def check(self) -> Iterator[UserError]:
        has_data = getattr(self, "val_dataset", None) or getattr(self, "split_dataset_ratio", 0) > 0
        is_off = getattr(self, "eval_iters", -1) == 0 or getattr(self, "eval_strategy", None) == "no"
        if self.early_stop_interval is not None and (is_off or not has_data):
            yield UserError(
                f"--early_stop_interval {self.early_stop_interval} compares evaluations, and there are none",
                "drop --eval_strategy no and --eval_iters 0"
                if has_data
                else "add --val_dataset or --split_dataset_ratio",
            )


@dataclasses.dataclass(kw_only=True)
class LoggingArguments(ReportArguments, EvaluationArguments):
    TITLE: ClassVar[str] = "Evaluation"

    eval_iters: int = arg(
        -1, "number of global batches per evaluation; -1: all of the validation data", at_least=-1
    )

    def fill(self) -> None:
        if self.eval_steps is None:
            self.eval_steps = getattr(self, "save_steps", None)
