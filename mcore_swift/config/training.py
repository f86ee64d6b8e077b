"""Batch sizes, length of the run, recomputation and fused kernels."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_ONLY_CUDA = "; only on CUDA and if the kernel is available, otherwise plain operations compute the same"


@dataclasses.dataclass(kw_only=True)
class StartingWeightsArguments(Arguments):
    TITLE: ClassVar[str] = "Training"

    seed: int = arg(42, "seed of initial weights and dropout", at_least=0)
    perform_initialization: bool = arg(
        False, "start from random weights for the architecture in config.json; --model then needs no weights"
    )


@dataclasses.dataclass(kw_only=True)
class TrainArguments(StartingWeightsArguments):
    TITLE: ClassVar[str] = "Training"

    micro_batch_size: int = arg(1, "samples (with packing: rows) per process and microbatch", at_least=1)
    global_batch_size: int = arg(16, "samples (with packing: rows) per step, over all processes", at_least=1)
    num_train_epochs: int | None = arg(None, "passes over the training data", at_least=1)
    train_iters: int | None = arg(None, "number of steps, instead of --num_train_epochs", at_least=1)
    calculate_per_token_loss: bool | None = arg(
        None,
        "loss of a step; true: the mean over its tokens; false: the mean of the means of its microbatches. The log "
        "shows the mean over tokens in both cases",
        default_text="true",
    )
    mtp_loss_scaling_factor: float = arg(
        0.1,
        "weight of the multi-token prediction loss (mean over its layers), relative to the next-token loss",
        at_least=0,
    )
    manual_gc: bool = arg(
        False, "run Python's garbage collection on all processes in the same step, instead of automatically"
    )
    manual_gc_steps: int = arg(0, "with --manual_gc, steps between collections; 0: never", at_least=0)
    manual_gc_eval: bool = arg(True, "with --manual_gc, collect before and after evaluation too")

    def fill(self) -> None:
        if self.calculate_per_token_loss is None:
            self.calculate_per_token_loss = True

    def check(self) -> Iterator[UserError]:
        if self.num_train_epochs is None and self.train_iters is None:
            yield UserError(
                "neither --num_train_epochs nor --train_iters says when to stop", "add --num_train_epochs 1"
            )
        if self.num_train_epochs is not None and self.train_iters is not None:
            yield UserError("--num_train_epochs and --train_iters both say when to stop", "give one of them")
        if self.global_batch_size % self.micro_batch_size:
            up = -(-self.global_batch_size // self.micro_batch_size) * self.micro_batch_size
            yield UserError(
                f"--global_batch_size {self.global_batch_size} is no multiple of --micro_batch_size "
                f"{self.micro_batch_size}",
                f"use --global_batch_size {up}",
            )


@dataclasses.dataclass(kw_only=True)
class RecomputeArguments(Arguments):
    TITLE: ClassVar[str] = "Recomputation (memory for time)"

    recompute_granularity: str = arg(
        "selective",
        "what is recomputed in the backward pass instead of stored: the parts in --recompute_modules (selective), "
        "whole layers (full), or nothing (none)",
        choices=("selective", "full", "none"),
    )
    recompute_modules: list[str] = arg(
        ["core_attn"],
        "parts to recompute with selective (core_attn has no effect with Transformer Engine, which stores no scores)",
        choices=("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"),
    )
    recompute_method: str | None = arg(
        None,
        "layers to recompute with full: all, in chunks of --recompute_num_layers (uniform), or that many of each "
        "pipeline stage (block)",
        choices=("uniform", "block"),
        default_text="uniform with full",
    )
    recompute_num_layers: int | None = arg(
        None, "layers per chunk (uniform) or stage (block)", at_least=1, default_text="1 with full"
    )

    def fill(self) -> None:
        if self.recompute_granularity == "full":
            self.recompute_method = self.recompute_method or "uniform"
            self.recompute_num_layers = self.recompute_num_layers or 1

    def check(self) -> Iterator[UserError]:
        if self.recompute_granularity != "full":
            for name in ("recompute_method", "recompute_num_layers"):
                if getattr(self, name) is not None:
                    yield UserError(
                        f"--{name} is for whole layers, and --recompute_granularity is "
                        f"{self.recompute_granularity}",
                        f"add --recompute_granularity full, or drop --{name}",
                    )


@dataclasses.dataclass(kw_only=True)
class KernelArguments(Arguments):
    TITLE: ClassVar[str] = "Kernels"

    attention_softmax_in_fp32: bool = arg(
        True, "softmax of attention in float32; the attention kernels used here always do this"
    )
    masked_softmax_fusion: bool = arg(
        True, "mask and softmax in one kernel; the attention kernels used here always include both"
    )
    bias_dropout_fusion: bool = arg(True, "bias, dropout and residual in one kernel" + _ONLY_CUDA)
    bias_activation_fusion: bool = arg(True, "bias and activation in one kernel" + _ONLY_CUDA)
    apply_rope_fusion: bool = arg(
        False, "rotary embedding in one kernel; needs Transformer Engine" + _ONLY_CUDA
    )
    gradient_accumulation_fusion: bool = arg(
        True,
        "add weight gradients inside the matrix product; needs fused_weight_gradient_mlp_cuda of NVIDIA's apex"
        + _ONLY_CUDA,
    )
    cross_entropy_loss_fusion: bool = arg(
        True,
        "vocabulary-parallel cross entropy in one kernel; output layer and loss are always fused here",
    )
