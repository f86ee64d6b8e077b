"""The optimizer, its learning rate over time, and weight decay."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

FULL_PARAMETER_LR = 1e-5
ADAPTER_LR = 1e-4


def default_lr(args: Arguments) -> float:
    """The default learning rate, which depends on what is trained."""
    return FULL_PARAMETER_LR if getattr(args, "tuner_type", "full") == "full" else ADAPTER_LR


@dataclasses.dataclass(kw_only=True)
class UpdateRuleArguments(Arguments):
    """The flags that `swift` and `megatron` have under the same names."""

    TITLE: ClassVar[str] = "Optimizer"

    min_lr: float = arg(0.0, "learning rate at the end of the decay", at_least=0)
    weight_decay: float = arg(0.1, "weight decay of matrices (biases and norms have none)", at_least=0)
    adam_beta1: float = arg(0.9, "decay of Adam's running mean of gradients", at_least=0, below=1)
    adam_beta2: float = arg(0.95, "decay of Adam's running mean of squared gradients", at_least=0, below=1)
    sgd_momentum: float = arg(0.9, "momentum of sgd", at_least=0, below=1)


@dataclasses.dataclass(kw_only=True)
class OptimizerArguments(UpdateRuleArguments):
    TITLE: ClassVar[str] = "Optimizer"

    optimizer: str = arg(
        "adam",
        "update rule (adam decouples weight decay, as AdamW does)",
        choices=("adam", "sgd"),
        refused=dict.fromkeys(("muon", "dist_muon"), "the muon optimizer is not supported yet"),
    )
    clip_grad: float = arg(1.0, "maximum norm of the gradient; 0: no clipping", at_least=0)
    adam_eps: float = arg(1e-8, "Adam's epsilon", above=0)
    weight_decay_incr_style: str = arg(
        "constant",
        "weight decay over the run: constant, or changing from --start_weight_decay to --end_weight_decay",
        choices=("constant", "linear", "cosine"),
    )
    start_weight_decay: float | None = arg(None, "weight decay at the start", at_least=0)
    end_weight_decay: float | None = arg(None, "weight decay at the end", at_least=0)
    apply_wd_to_qk_layernorm: bool = arg(False, "apply weight decay to the norms of queries and keys too")

    def fill(self) -> None:
        if self.weight_decay_incr_style == "constant":
            if self.start_weight_decay is None:
                self.start_weight_decay = self.weight_decay
            if self.end_weight_decay is None:
                self.end_weight_decay = self.weight_decay

    def check(self) -> Iterator[UserError]:
        if self.optimizer == "sgd" and getattr(self, "use_distributed_optimizer", False):
            yield UserError(
                "--optimizer sgd cannot be spread over data-parallel processes: the distributed optimizer of "
                "megatron-core is for adam",
                "add --use_distributed_optimizer false",
            )
        ends = {"start_weight_decay": self.start_weight_decay, "end_weight_decay": self.end_weight_decay}
        for name, value in ends.items():
            if self.weight_decay_incr_style == "constant":
                if value != self.weight_decay:
                    yield UserError(
                        f"--{name} {value:g} differs from --weight_decay {self.weight_decay:g}, and "
                        "--weight_decay_incr_style is constant",
                        "add --weight_decay_incr_style linear or cosine",
                    )
            elif value is None:
                yield UserError(
                    f"--weight_decay_incr_style {self.weight_decay_incr_style} needs --{name}",
                    f"add --{name} <number>",
                )


@dataclasses.dataclass(kw_only=True)
class ScheduleArguments(Arguments):
    TITLE: ClassVar[str] = "Learning rate"

    lr: float | None = arg(
        None,
        "maximum learning rate",
        at_least=0,
        default_text=f"{FULL_PARAMETER_LR:g} for all parameters, {ADAPTER_LR:g} for adapters",
    )
    lr_decay_style: str = arg(
        "cosine",
        "how the learning rate decays after the warm-up",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = arg(
        None, "step at which --min_lr is reached", at_least=1, default_text="the end of the run"
    )
    lr_warmup_iters: int = arg(0, "steps of linear warm-up", at_least=0)
    lr_warmup_fraction: float | None = arg(
        None, "warm-up as a fraction of the decay steps, instead of --lr_warmup_iters", at_least=0, at_most=1
    )
    lr_warmup_init: float = arg(0.0, "learning rate at the start of the warm-up", at_least=0)
    lr_wsd_decay_style: str = arg(
        "exponential",
        "shape of WSD's decay (warm-up, stable, decay)",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = arg(None, "number of steps of WSD's decay", at_least=1)

    def fill(self) -> None:
        if self.lr is None:
            self.lr = default_lr(self)

    def check(self) -> Iterator[UserError]:
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(self, name) > self.lr:
                yield UserError(
                    f"--{name} {getattr(self, name):g} is above --lr {self.lr:g}", f"lower --{name}"
                )
        if self.lr_warmup_iters and self.lr_warmup_fraction is not None:
            yield UserError(
                "--lr_warmup_iters and --lr_warmup_fraction both set the warm-up", "give one of them"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            yield UserError(
                "--lr_decay_style WSD needs to know when the decay begins",
                "add --lr_wsd_decay_iters <steps>",
            )
        if self.lr_decay_style != "WSD" and self.lr_wsd_decay_iters is not None:
            yield UserError(
                f"--lr_wsd_decay_iters is for WSD, and --lr_decay_style is {self.lr_decay_style}",
                "add --lr_decay_style WSD",
            )
        if self.lr_decay_iters is not None and self.lr_warmup_iters >= self.lr_decay_iters:
            yield UserError(
                f"--lr_warmup_iters {self.lr_warmup_iters} leaves nothing of --lr_decay_iters "
                f"{self.lr_decay_iters}",
                "warm up for fewer steps",
            )
