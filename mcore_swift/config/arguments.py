"""The arguments of each `megatron` command, composed of the groups of flags."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .checkpoint import CheckpointArguments, HFSaveArguments
from .data import DataArguments, PackingArguments
from .fields import arg, with_default
from .megatron_tuner import MegatronTunerArguments
from .model import ModelArguments, TemplateArguments
from .moe import ExpertParallelArguments, MoEArguments
from .optimizer import OptimizerArguments, ScheduleArguments
from .parallel import DataParallelArguments, ParallelArguments
from .quantization import QuantizationArguments
from .reporting import LoggingArguments
from .training import KernelArguments, RecomputeArguments, TrainArguments


@dataclasses.dataclass(kw_only=True)
class CommonArguments(Arguments):
    TITLE: ClassVar[str] = "Command line"

    ignore_args_error: bool = arg(False, "only warn about unknown flags instead of stopping")


@dataclasses.dataclass(kw_only=True)
class MegatronSftArguments(
    ModelArguments,
    DataArguments,
    TemplateArguments,
    PackingArguments,
    TrainArguments,
    MegatronTunerArguments,
    QuantizationArguments,
    ScheduleArguments,
    OptimizerArguments,
    ParallelArguments,
    ExpertParallelArguments,
    DataParallelArguments,
    MoEArguments,
    CheckpointArguments,
    LoggingArguments,
    RecomputeArguments,
    KernelArguments,
    CommonArguments,
):
    """Supervised fine-tuning on Megatron-core."""

    COMMAND: ClassVar[str] = "sft"
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "dataset")


@dataclasses.dataclass(kw_only=True)
class MegatronPretrainArguments(MegatronSftArguments):
    """Pre-training on Megatron-core: plain text, with a loss on every token."""

    COMMAND: ClassVar[str] = "pt"

    use_chat_template: bool = with_default(MegatronSftArguments, "use_chat_template", False)
    loss_scale: str = with_default(MegatronSftArguments, "loss_scale", "all")


@dataclasses.dataclass(kw_only=True)
class MegatronExportArguments(
    ModelArguments, ParallelArguments, ExpertParallelArguments, HFSaveArguments, CommonArguments
):
    """Convert a Hugging Face checkpoint to megatron-core's format, or back."""

    TITLE: ClassVar[str] = "Export"
    COMMAND: ClassVar[str] = "export"
    REQUIRED: ClassVar[tuple[str, ...]] = ("model",)

    to_mcore: bool = arg(False, "convert a Hugging Face checkpoint (--model) to a megatron-core checkpoint")
    to_hf: bool = arg(
        False, "convert a megatron-core checkpoint (--mcore_model) to a Hugging Face checkpoint"
    )
    mcore_model: str | None = arg(
        None,
        "megatron-core checkpoint to convert, from a training run or --to_mcore; config and tokenizer are taken from "
        "the --model in its args.json unless --model is given",
    )
    adapters: list[str] = arg(
        [], "adapter for these weights: a PEFT folder, or the checkpoint of a run that trained one"
    )
    mcore_adapter: str | None = arg(None, "the same: the checkpoint of a LoRA run on megatron-core")
    merge_lora: bool | None = arg(
        None,
        "with an adapter: write the model with the adapter merged, computed in float32 and rounded once; false: "
        "convert the adapter alone, to a PEFT folder (--to_hf) or a checkpoint to start from (--to_mcore)",
        default_text="as --to_hf",
    )
    output_dir: str | None = arg(
        None, "folder to write", default_text="<source folder>-mcore or <source folder>-hf"
    )
    exist_ok: bool = arg(False, "write into --output_dir even if it is not empty")
    dry_run: bool = arg(
        False,
        "write nothing; print what each process would read and write, whether the disk has room, and what does not fit",
    )
    test_convert_precision: bool = arg(
        False, "run both models on the same tokens and compare the logits; fail if they differ"
    )
    test_convert_dtype: str = arg(
        "float32",
        "precision of that comparison",
        choices=("float32", "bfloat16"),
        refused={"float16": "models are not built in float16 yet"},
    )
    seed: int = arg(42, "seed of the tokens for that comparison", at_least=0)

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter, whichever flag gives it; None without one."""
        return self.mcore_adapter or (self.adapters[0] if self.adapters else None)

    @property
    def needs_base(self) -> bool:
        """Whether the model's weights are read, and not only an adapter's."""
        return not self.adapter or bool(self.merge_lora)

    def fill(self) -> None:
        if self.merge_lora is None:
            self.merge_lora = bool(self.adapter) and self.to_hf
        source = self.adapter or (self.mcore_model if self.to_hf else self.model)
        if self.output_dir is None and source and self.to_hf != self.to_mcore:
            folder = Path(source)
            self.output_dir = str(folder.with_name(folder.name + ("-hf" if self.to_hf else "-mcore")))

    def check(self) -> Iterator[UserError]:
        if self.to_mcore == self.to_hf:
            both = "both --to_mcore and --to_hf" if self.to_hf else "neither --to_mcore nor --to_hf"
            yield UserError(
                f"{both} given: the direction is not clear", "give --to_mcore true or --to_hf true"
            )
        elif self.to_hf and not self.mcore_model and not self.adapter:
            yield UserError(
                "--to_hf converts a megatron-core checkpoint, and none is named", "add --mcore_model <folder>"
            )
        elif self.to_mcore and self.mcore_model and not self.adapter:
            yield UserError(
                "--to_mcore reads the Hugging Face checkpoint in --model, and --mcore_model is given too",
                "drop --mcore_model, or use --to_hf",
            )
        if len(self.adapters) + bool(self.mcore_adapter) > 1:
            yield UserError("--adapters and --mcore_adapter name several: one is taken at a time", "give one")
        if self.merge_lora and not self.adapter:
            yield UserError("--merge_lora true: no adapter is named", "add --adapters <folder>")
        if self.adapter and self.test_convert_precision:
            yield UserError(
                "--test_convert_precision compares whole checkpoints, and an adapter is merged or converted here",
                "drop it; once merged, the result can be converted with it",
            )
        if self.adapter and not self.merge_lora and self.dry_run:
            yield UserError("--dry_run: an adapter alone is converted in one piece", "drop --dry_run")


COMMANDS: dict[str, type[Arguments]] = {
    cls.COMMAND: cls for cls in (MegatronSftArguments, MegatronPretrainArguments, MegatronExportArguments)
}
