"""What is saved and how often, and what a run starts from or resumes."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def size_bytes(text: str) -> int:
    """Bytes of a size such as 5GB (powers of 1000, as Hugging Face counts) or 512MiB (of 1024).

    Raises ValueError.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is no size such as 5GB or 512MiB")
    unit = (match[2] or "").upper()
    return int(float(match[1]) * (1024 if unit.endswith("I") else 1000) ** _POWERS[unit.rstrip("I")])


@dataclasses.dataclass(kw_only=True)
class HFSaveArguments(Arguments):
    TITLE: ClassVar[str] = "Hugging Face files"

    max_shard_size: str = arg("5GB", "maximum size of a safetensors file, such as 5GB or 512MiB")
    memory_budget: str | None = arg(
        None,
        "memory a process may use for the pieces of weights it reads, gathers and writes, such as 512MB, in "
        "addition to the program and the model",
        default_text="the fastest size: about 0.1GB to convert files, 0.8GB to export a model",
    )

    def check(self) -> Iterator[UserError]:
        for flag, example in (("max_shard_size", "5GB"), ("memory_budget", "512MB")):
            value = getattr(self, flag)
            try:
                if value is not None and size_bytes(value) == 0:
                    yield UserError(f"--{flag} is 0: nothing fits", f"use --{flag} {example}")
            except ValueError as error:
                yield UserError(f"--{flag} {error}", f"use --{flag} {example}")


@dataclasses.dataclass(kw_only=True)
class SaveArguments(HFSaveArguments):
    TITLE: ClassVar[str] = "Output and checkpoints"

    add_version: bool = arg(True, "write into a new sub-folder vN-<time>, so that runs never mix")
    save_steps: int = arg(500, "steps between checkpoints; the last step is always saved", at_least=1)
    save_total_limit: int | None = arg(
        None,
        "number of checkpoints to keep, always including the newest and the best",
        at_least=1,
        default_text="all",
    )
    save_safetensors: bool = arg(
        True, "at each save, also write the weights as a Hugging Face checkpoint (of adapters: a PEFT folder)"
    )
    async_save: bool = arg(False, "write checkpoints in the background while training continues")
    create_checkpoint_symlink: bool = arg(
        False,
        "link the newest checkpoint as last (beside latest, which is always there) and the best one as best",
    )


@dataclasses.dataclass(kw_only=True)
class StartArguments(Arguments):
    TITLE: ClassVar[str] = "Start and resume"

    mcore_model: str | None = arg(
        None,
        "megatron-core checkpoint to start from, instead of the weights in --model (weights only, at step 0; with "
        "--finetune false the same as --resume)",
    )
    resume: str = arg(
        "none",
        "checkpoint or run folder to resume, with weights, optimizer, random state, step and position in the data, "
        "in any parallel layout. auto: the newest complete checkpoint in --output_dir, or a new run if there is "
        "none (implies --add_version false). none: a new run",
    )
    finetune: bool = arg(True, "with --mcore_model, load only the weights and start at step 0")
    no_load_optim: bool = arg(False, "when resuming, do not load the optimizer state")
    no_load_rng: bool = arg(False, "when resuming, do not load the random state")

    def fill(self) -> None:
        if self.mcore_model and not self.finetune and self.resume == "none":
            # ms-swift's way to resume a run; from here on there is only --resume
            self.resume, self.mcore_model = self.mcore_model, None
        if getattr(self, "mcore_adapter", None) and not self.finetune and self.resume == "none":
            self.resume, self.mcore_adapter = self.mcore_adapter, None

    def check(self) -> Iterator[UserError]:
        if self.mcore_model and self.resume != "none":
            yield UserError(
                "--mcore_model starts a new run from weights, --resume continues a run", "give one of them"
            )
        if not self.finetune and self.resume == "none":
            yield UserError(
                "--finetune false continues a run, but none is named",
                "add --resume <checkpoint or run folder>",
            )


@dataclasses.dataclass(kw_only=True)
class CheckpointArguments(SaveArguments, StartArguments):
    TITLE: ClassVar[str] = "Output and checkpoints"

    output_dir: str | None = arg(
        None,
        "folder of the run: logs and checkpoints",
        default_text="megatron_output/<name of the model>, or the run that --resume continues",
    )
    save_strategy: str = arg(
        "steps", "save every --save_steps steps, or after every epoch", choices=("steps", "epoch")
    )
    no_save_optim: bool = arg(False, "do not save the optimizer state; such a checkpoint cannot be resumed")
    no_save_rng: bool = arg(
        False, "do not save the random state; such a checkpoint cannot be resumed exactly"
    )
    metric_for_best_model: str = arg(
        "loss", "validation metric that determines the best checkpoint", choices=("loss",)
    )
    greater_is_better: bool = arg(
        False, "whether a greater value of that metric is better; for the loss, it is not"
    )

    def fill(self) -> None:
        if self.output_dir is None and self.resume not in ("none", "auto"):
            self.output_dir = self.resume  # a resumed run continues in its own folder
        elif self.output_dir is None and getattr(self, "model", None):
            self.output_dir = str(Path("megatron_output") / Path(self.model).resolve().name)
        if self.resume == "auto":
            self.add_version = False

    def check(self) -> Iterator[UserError]:
        if self.greater_is_better:
            yield UserError(
                "--greater_is_better true: the smaller loss is better", "drop --greater_is_better"
            )
