"""Arguments of `swift sft` and `swift pt`, and their form for the training loop."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from ..errors import UserError
from .arguments import (
    CommonArguments,
    MegatronExportArguments,
    MegatronPretrainArguments,
    MegatronSftArguments,
)
from .base import Arguments
from .checkpoint import HFSaveArguments
from .data import DataArguments, PackingArguments
from .fields import arg, flags_of, with_default
from .kernels import ComputeArguments
from .model import HFModelArguments, TemplateArguments
from .quantization import QuantizationArguments
from .reporting import ReportArguments
from .trainer import BackendArguments, TrainerArguments, TrainerSaveArguments
from .tuner import TunerArguments


class LoopArguments(SimpleNamespace):
    """The arguments under the names that the training loop and the engines use.

    source: the arguments as the user gave them, which are saved to args.json.
    """

    source: "SwiftSftArguments"

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/args.json; returns its path."""
        return self.source.save(folder)


@dataclasses.dataclass(kw_only=True)
class SwiftSftArguments(
    HFModelArguments,
    DataArguments,
    TemplateArguments,
    PackingArguments,
    TrainerArguments,
    TunerArguments,
    QuantizationArguments,
    TrainerSaveArguments,
    ReportArguments,
    BackendArguments,
    ComputeArguments,
    CommonArguments,
):
    """Supervised fine-tuning: of transformers' models on any number of processes, or on Megatron-core."""

    PROGRAM: ClassVar[str] = "swift"
    COMMAND: ClassVar[str] = "sft"
    REQUIRED: ClassVar[tuple[str, ...]] = ("model", "dataset")

    model: str | None = arg(
        None, "folder of the Hugging Face checkpoint to train: config.json, safetensors, tokenizer"
    )
    padding_free: bool = with_default(PackingArguments, "padding_free", False)

    def fill(self) -> None:
        if self.packing:
            self.padding_free = True  # as in ms-swift: packing implies padding-free rows

    def check(self) -> Iterator[UserError]:
        if self.backend == "megatron" and self.num_train_epochs != int(self.num_train_epochs):
            yield UserError(
                f"--num_train_epochs {self.num_train_epochs:g}: the Megatron engine takes whole epochs",
                "give whole epochs, or --max_steps",
            )
        if self.tuner_type == "llamapro" and self.perform_initialization:
            yield UserError(
                "--perform_initialization: --tuner_type llamapro extends a model that is there",
                "use --tuner_type full",
            )
        if self.backend == "megatron":
            yield from self._not_on_megatron()
        if self.fsdp_cpu_offload and self.backend == "ddp":
            yield UserError(
                "--fsdp_cpu_offload: --backend ddp keeps whole weights on each process's device",
                "use --backend fsdp, or drop it",
            )
        if self.backend == "megatron" and self.target_parameters:
            yield UserError(
                f"--target_parameters {' '.join(self.target_parameters)}: on megatron-core's layers each expert and "
                "each router is a module",
                "name them in --target_modules (down_proj, mlp.gate), or use --backend fsdp",
            )
        yield from self._quantization_problems()

    def _not_on_megatron(self) -> Iterator[UserError]:
        if self.tuner_type not in ("full", "lora"):
            yield UserError(
                f"--tuner_type {self.tuner_type} with --backend megatron: its layers have full and lora",
                "use --tuner_type lora, or --backend fsdp",
            )
        for name in ("attn_impl", "fsdp_cpu_offload"):
            if value := getattr(self, name):
                yield UserError(
                    f"--{name} {str(value).lower()} is for transformers' model, and --backend megatron has none",
                    f"drop --{name}",
                )

    def _quantization_problems(self) -> Iterator[UserError]:
        if not self.quant_method or self.tuner_type == "full":
            return
        if self.tuner_type not in _BESIDE_QUANTIZED:
            yield UserError(
                f"--quant_method: {self.tuner_type} adapters beside quantized weights are not supported",
                f"use --tuner_type {', '.join(_BESIDE_QUANTIZED)}",
            )
        if self.init_weights.startswith(("pissa", "olora")):
            yield UserError(
                f"--init_weights {self.init_weights} takes the start of the adapters out of the weights, and quantized "
                "ones cannot be changed",
                "drop it, or the quantization",
            )
        for name in ("fsdp_cpu_offload", "device_map"):
            if getattr(self, name):
                yield UserError(
                    f"--{name}: quantized weights stay on each process's device",
                    "drop it, or the quantization",
                )

    def for_loop(self, world_size: int, backend: str) -> Any:
        """These arguments for the training loop on `world_size` processes.

        backend: 'megatron', 'fsdp' or 'ddp', already chosen if the flag was 'auto'.
        """
        shared = self.sequence_parallel_size
        values = dict(vars(self)) | self.loop_settings(max(1, world_size // shared)) | self.save_settings()
        values["context_parallel_size"] = shared
        if backend != "megatron":
            single = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
            return LoopArguments(**(values | single | {"backend": backend, "source": self}))
        if values["num_train_epochs"] is not None:
            values["num_train_epochs"] = int(values["num_train_epochs"])
        granularity = "full" if self.gradient_checkpointing else "none"
        values["merge_lora"] = False  # here a checkpoint is a PEFT folder, whichever engine trains
        values |= {"recompute_granularity": granularity, "use_distributed_optimizer": self.optim != "sgd"}
        cls = _MEGATRON[self.COMMAND]
        return cls(**{name: value for name, value in values.items() if name in flags_of(cls)})


@dataclasses.dataclass(kw_only=True)
class SwiftPretrainArguments(SwiftSftArguments):
    """Pre-training: the same, on plain text with a loss on every token."""

    COMMAND: ClassVar[str] = "pt"

    use_chat_template: bool = with_default(SwiftSftArguments, "use_chat_template", False)
    loss_scale: str = with_default(SwiftSftArguments, "loss_scale", "all")


@dataclasses.dataclass(kw_only=True)
class SwiftExportArguments(HFSaveArguments, CommonArguments):
    """Join an adapter and the model it was trained beside, or make a PEFT folder of it."""

    TITLE: ClassVar[str] = "Export"
    PROGRAM: ClassVar[str] = "swift"
    COMMAND: ClassVar[str] = "export"
    adapters: list[str] = arg(
        [], "folder of a PEFT adapter, or a checkpoint of a run that trained one, such as checkpoint-100"
    )
    merge_lora: bool = arg(False, "write the model with the adapter added to its weights")
    to_peft_format: bool = arg(False, "write the adapter alone, as a PEFT folder")
    model: str | None = arg(None, "the base model", default_text="the one the adapter names")
    torch_dtype: str | None = arg(
        None,
        "precision of the result; the sum is made in float32",
        choices=("bfloat16", "float16", "float32"),
        default_text="that of the base, or of the adapter alone",
    )
    output_dir: str | None = arg(
        None, "folder to write", default_text="<adapter folder>-merged or <adapter folder>-peft"
    )
    exist_ok: bool = arg(False, "write into --output_dir even when it holds something")
    load_args: bool = arg(True, "take --model from the adapter's args.json where it is not given")

    def fill(self) -> None:
        if self.output_dir is None and self.adapters:
            folder = Path(self.adapters[0])
            self.output_dir = str(folder.with_name(folder.name + ("-merged" if self.merge_lora else "-peft")))

    def check(self) -> Iterator[UserError]:
        asked = self.merge_lora or self.to_peft_format
        if self.merge_lora and self.to_peft_format:
            yield UserError(
                "--merge_lora and --to_peft_format: the result is one or the other", "give one of them"
            )
        if not asked:
            # flags such as --quant_method are listed too: if one is given, its refusal is message enough
            yield UserError(
                "nothing is asked for that is there: --merge_lora, --to_peft_format, --to_mcore or --to_hf "
                "(--quant_method, --to_cached_dataset, --to_ollama and --push_to_hub are not supported yet)",
                "add --merge_lora true" if self.adapters else "add --adapters <folder> --merge_lora true",
            )
        elif not self.adapters:
            yield UserError("--adapters is missing", "add --adapters <folder of an adapter>")
        if len(self.adapters) > 1:
            yield UserError("--adapters names several: one is taken at a time", "give one folder")
        if self.memory_budget:
            yield UserError(
                "--memory_budget: merging holds the whole model in memory",
                "use `megatron export --to_hf true`, which holds pieces, or drop --memory_budget",
            )

    def as_megatron(self) -> MegatronExportArguments:
        """These arguments for `megatron export`, which can read adapters that peft cannot."""
        return MegatronExportArguments(
            model=self.model,
            adapters=self.adapters,
            to_hf=True,
            merge_lora=self.merge_lora,
            torch_dtype=self.torch_dtype,
            output_dir=self.output_dir,
            exist_ok=self.exist_ok,
            max_shard_size=self.max_shard_size,
        )


_BESIDE_QUANTIZED = ("lora", "ia3")
"""Tuners that were seen to train beside quantized weights; peft's vera cannot be saved there, others are not tried."""

_MEGATRON = {"sft": MegatronSftArguments, "pt": MegatronPretrainArguments}
SWIFT_COMMANDS: dict[str, type[Arguments]] = {
    cls.COMMAND: cls for cls in (SwiftSftArguments, SwiftPretrainArguments, SwiftExportArguments)
}
