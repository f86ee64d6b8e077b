"""Adapters on megatron-core's parallel layers: which layers get one, how large it is, and where it starts."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg
from .tuner import LORA_STARTS, check_freezing

_ON_TRANSFORMERS = "on megatron-core's layers it is not supported yet; `swift sft --backend fsdp` has it"

_STARTS = ("true", "gaussian", "orthogonal")
_OTHER_BASE = (
    "it takes the start of an adapter out of the weights beside it, which are other ones then: a checkpoint or PEFT "
    "folder of the adapter alone would not fit its base"
)


@dataclasses.dataclass(kw_only=True)
class MegatronTunerArguments(Arguments):
    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg(
        "full",
        "all parameters, or low-rank adapters beside frozen weights (lora), of which a checkpoint then holds the "
        "adapter alone, in PEFT's form too",
        choices=("full", "lora"),
        refused={
            "lora_llm": "it is for models with a vision part, which are not supported yet",
            **dict.fromkeys(("loha", "lokr", "oft", "boft", "vera", "ia3"), _ON_TRANSFORMERS),
        },
    )
    adapters: list[str] = arg(
        [], "PEFT folder of the adapter to start from; its own rank, alpha and targets win over the command's"
    )
    mcore_adapter: str | None = arg(None, "checkpoint whose adapter to start from, at step 0")
    target_modules: list[str] = arg(
        ["all-linear"],
        "layers with an adapter: ends of Hugging Face module names (q_proj), names of megatron-core's fused layers "
        "(linear_qkv), all-linear: every matrix of attention, MLP and experts; all-router, all-embedding. The output "
        "layer (lm_head) is in none of these and is named",
    )
    target_regex: str | None = arg(
        None, "layers with an adapter, by an expression that matches their whole Hugging Face name"
    )
    lora_rank: int = arg(8, "rows of A and columns of B", at_least=1)
    lora_alpha: float = arg(32, "adapters count alpha / rank times", above=0)
    lora_dropout: float = arg(0.05, "share of an adapter's inputs left out in training", at_least=0, below=1)
    use_rslora: bool = arg(False, "alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732)")
    use_dora: bool = arg(
        False, "DoRA: direction by the adapter, magnitude of each row trained apart (arXiv:2402.09353)"
    )
    init_weights: str = arg(
        "true",
        "how A and B start: peft's usual values, gaussian, or orthogonal",
        choices=_STARTS,
        refused=dict.fromkeys(sorted(set(LORA_STARTS) - set(_STARTS)), _OTHER_BASE),
    )
    modules_to_save: list[str] = arg(
        [],
        "modules that train whole beside the adapters, by the ends of their Hugging Face names (embed_tokens, "
        "lm_head, norm, mlp.gate); a tied embedding stays tied",
    )
    lora_bias: str = arg(
        "none",
        "biases that train too: all, or those of layers with adapters",
        choices=("none", "all", "lora_only"),
    )
    lorap_lr_ratio: float | None = arg(
        None,
        "LoRA+: learning rate of B as a multiple of that of all else (arXiv:2402.12354); the schedule moves both",
        above=0,
    )
    merge_lora: bool | None = arg(
        None,
        "with adapters, at each save: write the whole model with the adapter in its weights too, as a Hugging Face "
        "checkpoint in checkpoint-N-merged. The frozen weights stay as they are",
        default_text="as --save_safetensors",
    )
    freeze_parameters: list[str] = arg(
        [], "with full: weights that stay as they are, by the beginnings of their Hugging Face names"
    )
    freeze_parameters_regex: str | None = arg(
        None, "with full: weights that stay, by an expression found in their Hugging Face names"
    )
    freeze_parameters_ratio: float = arg(
        0.0, "with full: share of the parameters that stays, counted from the input", at_least=0, at_most=1
    )
    trainable_parameters: list[str] = arg(
        [], "with full: weights that train all the same, by the beginnings of their Hugging Face names"
    )
    trainable_parameters_regex: str | None = arg(None, "the same by an expression found in their names")

    def fill(self) -> None:
        if self.merge_lora is None:
            self.merge_lora = self.tuner_type == "lora" and getattr(self, "save_safetensors", False)

    def check(self) -> Iterator[UserError]:
        yield from check_freezing(self)
        if self.merge_lora and self.tuner_type != "lora":
            yield UserError("--merge_lora true: there is no adapter to merge", "add --tuner_type lora")
        elif self.merge_lora and not getattr(self, "save_safetensors", True):
            yield UserError(
                "--merge_lora true writes safetensors at each save, and --save_safetensors false writes none",
                "drop one of them",
            )
        lora = self.tuner_type == "lora"
        for name in ("adapters", "mcore_adapter") if not lora else ():
            if getattr(self, name):
                yield UserError(
                    f"--{name} names an adapter, and all parameters are trained", "add --tuner_type lora"
                )
        lora_only = ("use_rslora", "use_dora", "lorap_lr_ratio", "modules_to_save")
        for name in (*lora_only, *(["lora_bias"] if self.lora_bias != "none" else [])) if not lora else ():
            if getattr(self, name):
                yield UserError(f"--{name} is for --tuner_type lora, not {self.tuner_type}", f"drop --{name}")
        if self.init_weights not in _STARTS:
            yield UserError(
                f"--init_weights {self.init_weights}: {_OTHER_BASE}",
                "use --init_weights orthogonal, or `swift sft --backend fsdp`",
            )
        if len(self.adapters) > 1:
            yield UserError(f"--adapters names {len(self.adapters)}: one can be trained", "give one folder")
        if self.adapters and self.mcore_adapter:
            yield UserError("--adapters and --mcore_adapter both name what to start from", "give one of them")
        if lora and getattr(self, "mcore_model", None):
            yield UserError(
                "--mcore_model gives the weights of a full training run, and with --tuner_type lora they are those "
                "of --model",
                "export it first with `megatron export --to_hf true` and give the folder to --model",
            )
