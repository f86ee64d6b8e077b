"""What `megatron sft` and `megatron pt` train: LoRA on megatron-core's parallel layers, or all parameters."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .fields import arg
from .trained_parameters import TrainedParametersArguments
from .tuner import LORA_STARTS

_ON_TRANSFORMERS = "not supported on megatron-core's layers yet; `swift sft --backend fsdp` has it"
_STARTS = ("true", "gaussian", "orthogonal")
_CHANGES_BASE = (
    "it initializes the adapter from the frozen weights and changes those; a checkpoint or PEFT folder, which holds "
    "the adapter alone, would no longer fit its base model"
)


@dataclasses.dataclass(kw_only=True)
class MegatronTunerArguments(TrainedParametersArguments):
    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg(
        "full",
        "what trains: all parameters (full), or low-rank adapters beside frozen weights (lora); checkpoints then "
        "hold the adapter alone, also as a PEFT folder",
        choices=("full", "lora"),
        refused={
            "lora_llm": "it is for models with a vision part, which are not supported yet",
            **dict.fromkeys(("loha", "lokr", "oft", "boft", "vera", "ia3"), _ON_TRANSFORMERS),
        },
    )
    mcore_adapter: str | None = arg(
        None, "checkpoint of a LoRA run on megatron-core; start a new run from its adapter, at step 0"
    )
    target_modules: list[str] = arg(
        ["all-linear"],
        "layers that get an adapter: ends of Hugging Face module names (q_proj), names of megatron-core's fused "
        "layers (linear_qkv), all-linear (every matrix of attention, MLP and experts), all-router, all-embedding. "
        "The output layer gets one only if it is named (lm_head)",
    )
    lora_alpha: float = arg(
        32, "alpha: adapters are scaled by alpha / rank (with rsLoRA, alpha / sqrt(rank))", above=0
    )
    init_weights: str = arg(
        "true",
        "how A and B are initialized: as peft does by default (true), gaussian, or orthogonal",
        choices=_STARTS,
        refused=dict.fromkeys(sorted(set(LORA_STARTS) - set(_STARTS)), _CHANGES_BASE),
    )
    merge_lora: bool | None = arg(
        None,
        "with lora: at each save, also write the whole model with the adapter merged, as a Hugging Face checkpoint "
        "in checkpoint-N-merged; the frozen weights in memory are not changed",
        default_text="as --save_safetensors",
    )

    def fill(self) -> None:
        if self.merge_lora is None:
            self.merge_lora = self.tuner_type == "lora" and getattr(self, "save_safetensors", False)

    def check(self) -> Iterator[UserError]:
        if self.tuner_type == "lora":
            yield from self._check_lora()
        else:
            yield from self._check_full()
        if self.init_weights not in _STARTS:
            yield UserError(
                f"--init_weights {self.init_weights}: {_CHANGES_BASE}",
                "use --init_weights orthogonal, or `swift sft --backend fsdp`",
            )

    def _check_lora(self) -> Iterator[UserError]:
        if self.merge_lora and not getattr(self, "save_safetensors", True):
            yield UserError(
                "--merge_lora true writes safetensors at each save, and --save_safetensors false writes none",
                "drop one of them",
            )
        if self.adapters and self.mcore_adapter:
            yield UserError("--adapters and --mcore_adapter both name what to start from", "give one of them")
        if getattr(self, "mcore_model", None):
            yield UserError(
                "--mcore_model gives the weights of a full training run; with --tuner_type lora the frozen weights "
                "are those of --model",
                "export it first with `megatron export --to_hf true` and give the folder to --model",
            )

    def _check_full(self) -> Iterator[UserError]:
        if self.merge_lora:
            yield UserError("--merge_lora true: there is no adapter to merge", "add --tuner_type lora")
        for name in ("adapters", "mcore_adapter"):
            if getattr(self, name):
                yield UserError(
                    f"--{name} names an adapter, and all parameters are trained", "add --tuner_type lora"
                )
        given = [
            name
            for name in ("use_rslora", "use_dora", "lorap_lr_ratio", "modules_to_save")
            if getattr(self, name)
        ]
        given += ["lora_bias"] if self.lora_bias != "none" else []
        for name in given:
            yield UserError(f"--{name} is for --tuner_type lora, not full", f"drop --{name}")
