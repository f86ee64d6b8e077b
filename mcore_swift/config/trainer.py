"""Flags of `swift sft` and `swift pt` under the names of transformers' Trainer."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UserError
from .checkpoint import SaveArguments
from .fields import arg
from .optimizer import ADAPTER_LR, FULL_PARAMETER_LR, UpdateRuleArguments, default_lr
from .parallel import ProcessGroupArguments
from .reporting import EvaluationArguments
from .training import StartingWeightsArguments

WORLD_BATCH = 16
"""Samples per step that the default of --gradient_accumulation_steps aims for."""

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adam"),
    **{name: name for name in ("sgd", "adafactor", "muon", "galore_adamw")},
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw_32bit"),
}
ELEMENTWISE = ("adam", "sgd")
"""Optimizers that treat each element separately: they work on sharded parameters, and the Megatron engine has them."""
_SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse-square-root",
}


@dataclasses.dataclass(kw_only=True)
class BackendArguments(ProcessGroupArguments):
    TITLE: ClassVar[str] = "Processes and memory"

    backend: str = arg(
        "auto",
        "engine: the transformers model, sharded over the processes (fsdp) or replicated on each (ddp), or "
        "megatron-core (megatron); auto chooses one and prints the reason",
        choices=("auto", "megatron", "fsdp", "ddp"),
    )
    attn_impl: str | None = arg(
        None,
        "attention implementation of the transformers model; flash_attn: flash_attention_2 if installed, else sdpa",
        choices=(
            "sdpa",
            "eager",
            "flash_attn",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
        ),
        refused={"flex_attention": "it has not been tried yet"},
        default_text="flash_attention_2 for packed rows if installed, else transformers' choice",
    )
    sequence_parallel_size: int = arg(
        1,
        "processes that divide the tokens of each row, for rows too long for one process; attention exchanges "
        "tokens for heads (Ulysses, arXiv:2309.14509)",
        at_least=1,
    )
    gradient_checkpointing: bool = arg(
        True, "keep only the input of each layer, and recompute the rest in the backward pass"
    )
    device_map: str | None = arg(
        None,
        "with one process and several GPUs: distribute the layers over them with accelerate, for models that do "
        "not fit on one; no effect with one device",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
    )
    max_memory: dict[str, Any] | None = arg(
        None, 'memory limits for --device_map as JSON: {"0": "20GB", "1": "40GB"}'
    )
    fsdp_cpu_offload: bool = arg(False, "on GPUs: keep weights and optimizer state in host memory")

    def check(self) -> Iterator[UserError]:
        if self.max_memory and not self.device_map:
            yield UserError("--max_memory is for --device_map, which is not given", "add --device_map auto")
        if not self.device_map:
            return
        others = {
            "--backend": None if self.backend in ("auto", "fsdp") else self.backend,
            "--fsdp_cpu_offload": self.fsdp_cpu_offload or None,
            "--perform_initialization": getattr(self, "perform_initialization", False) or None,
        }
        for flag, value in others.items():
            if value is not None:
                yield UserError(f"--device_map {self.device_map} with {flag} {value}", f"drop {flag}")


@dataclasses.dataclass(kw_only=True)
class TrainerArguments(StartingWeightsArguments, UpdateRuleArguments):
    TITLE: ClassVar[str] = "Training"

    per_device_train_batch_size: int = arg(1, "samples per process and microbatch", at_least=1)
    gradient_accumulation_steps: int | None = arg(
        None,
        "microbatches per process and step",
        at_least=1,
        default_text=f"as many as needed for {WORLD_BATCH} samples per step",
    )
    num_train_epochs: float = arg(3.0, "passes over the training data", above=0)
    max_steps: int = arg(-1, "number of steps, instead of --num_train_epochs; -1: by epochs", at_least=-1)
    learning_rate: float | None = arg(
        None,
        "maximum learning rate",
        at_least=0,
        default_text=f"{FULL_PARAMETER_LR:g} for all parameters, else {ADAPTER_LR:g}",
    )
    lr_scheduler_type: str = arg(
        "cosine", "how the learning rate decays after the warm-up", choices=tuple(_SCHEDULES)
    )
    warmup_ratio: float = arg(0.0, "warm-up as a fraction of all steps", at_least=0, at_most=1)
    warmup_steps: int = arg(0, "number of warm-up steps, instead of --warmup_ratio", at_least=0)
    optim: str = arg(
        "adamw_torch",
        "optimizer: AdamW, SGD, Adafactor; Muon and GaLore (galore-torch) for matrices with AdamW for the rest; "
        "AdamW with 8-bit or paged state (bitsandbytes). All but AdamW and SGD need whole parameters: --backend ddp, "
        "or one process",
        choices=tuple(_OPTIMIZERS),
    )
    use_galore: bool = arg(False, "the same as --optim galore_adamw")
    galore_rank: int = arg(128, "GaLore (arXiv:2403.03507): rank of the projected gradients", at_least=1)
    galore_update_proj_gap: int = arg(50, "GaLore: steps between updates of the projection", at_least=1)
    galore_scale: float = arg(1.0, "GaLore: factor on projected updates", above=0)
    galore_proj_type: str = arg(
        "std",
        "GaLore: side of a matrix that is projected",
        choices=("std", "reverse_std", "right", "left"),
    )
    adam_epsilon: float = arg(1e-8, "Adam's epsilon", above=0)
    max_grad_norm: float = arg(1.0, "maximum norm of the gradient; 0: no clipping", at_least=0)

    @property
    def whole_parameters(self) -> bool:
        """Whether the optimizer needs parameters that are not sharded."""
        return _OPTIMIZERS[self.optim] not in ELEMENTWISE

    def fill(self) -> None:
        if self.use_galore and self.optim in ("adamw_torch", "adamw_hf", "adamw_torch_fused"):
            self.optim = "galore_adamw"

    def check(self) -> Iterator[UserError]:
        yield from self._check_optimizer()
        if self.max_steps == 0:
            yield UserError("--max_steps 0 trains nothing", "give the number of steps, or -1")
        if self.warmup_ratio and self.warmup_steps:
            yield UserError("--warmup_ratio and --warmup_steps both set the warm-up", "give one of them")
        if self.learning_rate is not None and self.min_lr > self.learning_rate:
            yield UserError(
                f"--min_lr {self.min_lr:g} is above --learning_rate {self.learning_rate:g}", "lower --min_lr"
            )
        if self.lr_scheduler_type.startswith("constant") and self.min_lr:
            yield UserError("--min_lr: a constant learning rate does not fall", "drop --min_lr")

    def _check_optimizer(self) -> Iterator[UserError]:
        if self.use_galore and self.optim != "galore_adamw":
            yield UserError(f"--use_galore true with --optim {self.optim}", "give one of them")
        if not self.whole_parameters:
            return
        if getattr(self, "backend", None) == "megatron":
            yield UserError(
                f"--optim {self.optim}: the Megatron engine has adamw_torch and sgd", "use --backend ddp"
            )
        if getattr(self, "tuner_type", None) == "adalora":
            yield UserError(
                f"--optim {self.optim}: adalora prunes by the state of adamw_torch or sgd", "drop --optim"
            )

    def loop_settings(self, world_size: int) -> dict[str, object]:
        """The flags under the names of the training loop and the engines. world_size: data-parallel processes."""
        lr = self.learning_rate if self.learning_rate is not None else default_lr(self)
        a_round = self.per_device_train_batch_size * world_size
        rounds = self.gradient_accumulation_steps or -(-WORLD_BATCH // a_round)
        return {
            "micro_batch_size": self.per_device_train_batch_size,
            "global_batch_size": a_round * rounds,
            "train_iters": self.max_steps if self.max_steps > 0 else None,
            "num_train_epochs": None if self.max_steps > 0 else self.num_train_epochs,
            "lr": lr,
            "lr_decay_style": _SCHEDULES[self.lr_scheduler_type],
            "lr_decay_iters": None,
            "lr_warmup_iters": self.warmup_steps,
            "lr_warmup_fraction": self.warmup_ratio or None,
            "lr_warmup_init": 0.0,
            "lr_wsd_decay_style": "exponential",
            "lr_wsd_decay_iters": None,
            "optimizer": _OPTIMIZERS[self.optim],
            "adam_eps": self.adam_epsilon,
            "clip_grad": self.max_grad_norm,
            "weight_decay_incr_style": "constant",
            "start_weight_decay": self.weight_decay,
            "end_weight_decay": self.weight_decay,
            "calculate_per_token_loss": True,
            "manual_gc": False,
        }


@dataclasses.dataclass(kw_only=True)
class TrainerEvaluationArguments(EvaluationArguments):
    TITLE: ClassVar[str] = "Evaluation"

    eval_strategy: str | None = arg(
        None,
        "when to evaluate: every --eval_steps steps, after every epoch, or never (no)",
        choices=("steps", "epoch", "no"),
        default_text="as --save_strategy if there is validation data",
    )


@dataclasses.dataclass(kw_only=True)
class TrainerSaveArguments(SaveArguments, TrainerEvaluationArguments):
    TITLE: ClassVar[str] = "Output and checkpoints"

    output_dir: str | None = arg(
        None,
        "folder of the run: logs and checkpoints",
        default_text="output/<name of the model>, or the run that is resumed",
    )
    save_strategy: str = arg(
        "steps",
        "save every --save_steps steps, after every epoch, or only after the last step (no)",
        choices=("steps", "epoch", "no"),
    )
    save_only_model: bool = arg(False, "do not save the optimizer state; such a checkpoint cannot be resumed")
    resume_from_checkpoint: str | None = arg(
        None,
        "checkpoint or run folder to resume, with weights, optimizer, step and position in the data, on any number "
        "of processes. auto: the newest in --output_dir, or a new run if there is none",
    )
    resume_only_model: bool = arg(False, "when resuming, load weights and step, but not the optimizer state")

    def fill(self) -> None:
        resume = self.resume_from_checkpoint
        if resume in ("true", "True"):
            self.resume_from_checkpoint = resume = "auto"
        if self.output_dir is None and resume not in (None, "auto"):
            self.output_dir = resume  # a resumed run continues in its own folder
        elif self.output_dir is None and getattr(self, "model", None):
            self.output_dir = str(Path("output") / Path(self.model).resolve().name)
        if resume == "auto":
            self.add_version = False

    def check(self) -> Iterator[UserError]:
        if self.eval_strategy == "epoch" and self.save_strategy != "epoch":
            yield UserError(
                f"--eval_strategy epoch with --save_strategy {self.save_strategy}: a checkpoint is judged by the "
                "evaluation at its step",
                "add --save_strategy epoch, or give --eval_steps",
            )
        if self.resume_only_model and not self.resume_from_checkpoint:
            yield UserError(
                "--resume_only_model says how to resume, and nothing is resumed",
                "add --resume_from_checkpoint <folder>, or start from weights with --model",
            )

    def save_settings(self) -> dict[str, object]:
        """The flags under the names of the training loop."""
        every = self.save_steps if self.save_strategy != "no" else 1 << 62
        by_epoch = (self.eval_strategy or self.save_strategy) == "epoch" and self.eval_steps is None
        return {
            "save_strategy": "epoch" if self.save_strategy == "epoch" else "steps",
            "save_steps": every,
            "eval_steps": None if by_epoch else self.eval_steps or self.save_steps,
            "eval_iters": 0 if self.eval_strategy == "no" else -1,
            "resume": self.resume_from_checkpoint or "none",
            "mcore_model": None,
            "finetune": True,
            "no_save_optim": self.save_only_model,
            "no_save_rng": False,
            "no_load_optim": self.resume_only_model,
            "no_load_rng": self.resume_only_model,
        }
