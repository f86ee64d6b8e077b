"""What `swift sft` and `swift pt` train: peft's tuners on a transformers model, all parameters, or new layers."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar

from ..errors import UserError
from .fields import arg
from .trained_parameters import TrainedParametersArguments

_LOW_RANK = ("lora", "loha", "lokr")
_KINDS_OF = {
    "lora_rank": _LOW_RANK,
    "lora_alpha": (*_LOW_RANK, "adalora"),
    "lora_dropout": (*_LOW_RANK, "adalora", "oft"),
    "lora_bias": ("lora",),
    "init_weights": ("lora",),
    "oft_": ("oft",),
    "boft_": ("boft",),
    "vera_": ("vera",),
    "adalora_": ("adalora",),
    "fourier_": ("fourierft",),
    "llamapro_": ("llamapro",),
}
"""Flags, or how they begin -> the kinds of adapters that have them."""
_NOT_IN_PEFT = "peft has no such tuner"
LORA_STARTS = ("true", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "orthogonal")
"""Values of --init_weights; 'true' is peft's default: A random, B zero."""


@dataclasses.dataclass(kw_only=True)
class TunerArguments(TrainedParametersArguments):
    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg(
        "lora",
        "what trains: adapters of the named kind, all parameters (full), or new layers inserted into the model "
        "(llamapro)",
        choices=(
            *("full", "lora", "adalora", "loha", "lokr", "oft", "boft", "vera", "ia3", "fourierft"),
            "llamapro",
        ),
        refused={
            **dict.fromkeys(("lora_llm", "adapter", "reft"), _NOT_IN_PEFT),
            "longlora": "peft does not have its shifted attention; use --sequence_parallel_size for long rows",
            "bone": "peft replaced it with MiSS, which is not supported yet",
        },
    )
    target_modules: list[str] = arg(
        ["all-linear"],
        "modules that get an adapter, by the end of their name; all-linear: every linear layer but the output layer",
    )
    target_parameters: list[str] = arg(
        [],
        "with lora: parameters that get an adapter although they are no linear layer, such as experts.gate_up_proj, "
        "which holds all experts of a layer",
    )
    lora_alpha: int = arg(
        32, "alpha: adapters are scaled by alpha / rank (with rsLoRA, alpha / sqrt(rank))", above=0
    )
    init_weights: str = arg(
        "true", "how lora matrices are initialized; true: as peft does", choices=LORA_STARTS
    )
    oft_block_size: int = arg(32, "oft: size of the rotation blocks", at_least=1)
    boft_block_size: int = arg(4, "boft: size of the rotation blocks", at_least=1)
    boft_block_num: int = arg(0, "boft: number of rotation blocks, instead of their size", at_least=0)
    boft_n_butterfly_factor: int = arg(1, "boft: number of butterfly factors", at_least=1)
    boft_dropout: float = arg(0.0, "boft: probability that a block is dropped", at_least=0, below=1)
    vera_rank: int = arg(256, "vera: rank of the shared random projections", at_least=1)
    vera_projection_prng_key: int = arg(0, "vera: seed of the shared random projections", at_least=0)
    vera_dropout: float = arg(0.0, "vera: dropout probability on the input", at_least=0, below=1)
    vera_d_initial: float = arg(0.1, "vera: initial value of the scaling vector d")
    adalora_target_r: int = arg(
        8, "adalora (arXiv:2303.10512): average rank of the adapters after pruning", at_least=1
    )
    adalora_init_r: int = arg(12, "adalora: initial rank of the adapters", at_least=1)
    adalora_tinit: int = arg(0, "adalora: steps before pruning begins", at_least=0)
    adalora_tfinal: int = arg(0, "adalora: steps at the end during which the ranks are fixed", at_least=0)
    adalora_deltaT: int = arg(1, "adalora: steps between two prunings", at_least=1)
    adalora_beta1: float = arg(0.85, "adalora: decay of the running mean of sensitivity", above=0, below=1)
    adalora_beta2: float = arg(0.85, "adalora: decay of the running mean of uncertainty", above=0, below=1)
    adalora_orth_reg_weight: float = arg(0.5, "adalora: weight of the orthogonality regularizer", at_least=0)
    fourier_n_frequency: int = arg(2000, "fourierft: number of learned coefficients per matrix", at_least=1)
    fourier_scaling: float = arg(300.0, "fourierft: scale of the update", above=0)
    llamapro_num_new_blocks: int = arg(
        4, "llamapro (arXiv:2401.02415): number of layers to insert and train", at_least=1
    )
    llamapro_num_groups: int | None = arg(
        None,
        "llamapro: groups that the layers are divided into; new layers go to the end of each group",
        at_least=1,
        default_text="--llamapro_num_new_blocks",
    )

    def check(self) -> Iterator[UserError]:
        lora_only = ("use_dora", "use_rslora", "lorap_lr_ratio", "target_parameters")
        for name in lora_only if self.tuner_type != "lora" else ():
            if getattr(self, name):
                yield UserError(f"--{name} is for --tuner_type lora, not {self.tuner_type}", f"drop --{name}")
        if self.tuner_type == "adalora" and self.adalora_init_r < self.adalora_target_r:
            yield UserError(
                f"--adalora_init_r {self.adalora_init_r} is below --adalora_target_r {self.adalora_target_r}: ranks "
                "only fall",
                "raise --adalora_init_r",
            )
        if self.adapters and self.tuner_type in ("full", "llamapro", "adalora"):
            yield UserError(
                f"--adapters continues training an adapter, which --tuner_type {self.tuner_type} does not",
                "drop one, or merge first with `swift export --merge_lora true`",
            )
        if self.target_regex and self.target_modules != ["all-linear"]:
            yield UserError(
                "--target_modules and --target_regex both say what gets adapters", "give one of them"
            )


def without_effect(given: Iterable[str], tuner_type: str) -> list[str]:
    """Flags among `given` that describe other adapters than those of this tuner."""
    adapters = ("target_modules", "target_regex", "modules_to_save")
    names = [name for name in adapters if name in given and tuner_type in ("full", "llamapro")]
    for name in given:
        key = name if name in _KINDS_OF else name.split("_")[0] + "_"
        if key in _KINDS_OF and tuner_type not in _KINDS_OF[key]:
            names.append(name)
    return names
