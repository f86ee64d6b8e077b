"""Which parameters train: all, some, or adapters beside frozen ones."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_NOT_IN_PEFT = "peft has no such tuner"
LORA_STARTS = ("true", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "orthogonal")
"""Values of --init_weights: 'true' is peft's own, A random and B zero."""


@dataclasses.dataclass(kw_only=True)
class TunerArguments(Arguments):
    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg(
        "lora",
        "adapters of this kind, all parameters (full), or new layers among those of the model (llamapro)",
        choices=(
            "full",
            "lora",
            "adalora",
            "loha",
            "lokr",
            "oft",
            "boft",
            "vera",
            "ia3",
            "fourierft",
            "llamapro",
        ),
        refused={
            **dict.fromkeys(("lora_llm", "adapter", "reft"), _NOT_IN_PEFT),
            "longlora": "its shifted attention is not in peft; --sequence_parallel_size makes long rows fit",
            "bone": "peft has given it up for MiSS, which is not supported yet",
        },
    )
    adapters: list[str] = arg(
        [], "PEFT adapter folder to go on training; its own settings win over those of the command"
    )
    target_modules: list[str] = arg(
        ["all-linear"],
        "modules that get an adapter: the ends of their names, or all-linear (all but the output layer)",
    )
    target_regex: str | None = arg(
        None, "modules that get an adapter, by a regular expression of whole names"
    )
    target_parameters: list[str] = arg(
        [], "parameters that get an adapter (lora), such as experts.gate_up_proj, of experts in one tensor"
    )
    modules_to_save: list[str] = arg(
        [], "modules that train whole beside the adapters, as embed_tokens lm_head"
    )
    lora_rank: int = arg(8, "rank of the adapters (lora, loha, lokr)", at_least=1)
    lora_alpha: int = arg(32, "their scale is this over the rank (with rsLoRA, over its root)", above=0)
    lora_dropout: float = arg(0.05, "dropout on the adapters' input", at_least=0, below=1)
    lora_bias: str = arg("none", "biases that train too", choices=("none", "all", "lora_only"))
    use_dora: bool = arg(False, "DoRA: direction by the adapter, magnitude trained apart (arXiv:2402.09353)")
    use_rslora: bool = arg(False, "rank-stabilized scale (arXiv:2312.03732)")
    lorap_lr_ratio: float | None = arg(
        None, "LoRA+: learning rate of B as a multiple of that of A (arXiv:2402.12354)", above=0
    )
    init_weights: str = arg("true", "how lora starts", choices=LORA_STARTS)
    oft_block_size: int = arg(32, "block of oft's rotations", at_least=1)
    boft_block_size: int = arg(4, "block of boft's rotations", at_least=1)
    boft_block_num: int = arg(0, "blocks of boft's rotations, in place of their size", at_least=0)
    boft_n_butterfly_factor: int = arg(1, "butterfly factors of boft", at_least=1)
    boft_dropout: float = arg(0.0, "dropout of boft's blocks", at_least=0, below=1)
    vera_rank: int = arg(256, "rank of vera's shared projections", at_least=1)
    vera_projection_prng_key: int = arg(0, "seed of those projections", at_least=0)
    vera_dropout: float = arg(0.0, "dropout on vera's input", at_least=0, below=1)
    vera_d_initial: float = arg(0.1, "start of vera's vector d")
    adalora_target_r: int = arg(
        8, "mean rank that adalora (arXiv:2303.10512) prunes its adapters to", at_least=1
    )
    adalora_init_r: int = arg(12, "rank they begin with", at_least=1)
    adalora_tinit: int = arg(0, "steps before it prunes", at_least=0)
    adalora_tfinal: int = arg(0, "steps at the end in which ranks stay", at_least=0)
    adalora_deltaT: int = arg(1, "steps between two choices of what to prune", at_least=1)
    adalora_beta1: float = arg(0.85, "decay of a weight's importance", above=0, below=1)
    adalora_beta2: float = arg(0.85, "decay of how unsure it is", above=0, below=1)
    adalora_orth_reg_weight: float = arg(
        0.5, "weight of the factors' distance from orthogonality", at_least=0
    )
    fourier_n_frequency: int = arg(2000, "coefficients fourierft learns for each matrix", at_least=1)
    fourier_scaling: float = arg(300.0, "scale of what they give", above=0)
    llamapro_num_new_blocks: int = arg(
        4, "layers that llamapro (arXiv:2401.02415) adds and trains", at_least=1
    )
    llamapro_num_groups: int | None = arg(
        None, "groups of layers behind which they are put", at_least=1, default_text="as many as new layers"
    )
    freeze_parameters: list[str] = arg(
        [], "with full: parameters that stay, by the beginnings of their names"
    )
    freeze_parameters_regex: str | None = arg(
        None, "with full: parameters that stay, by a regular expression"
    )
    freeze_parameters_ratio: float = arg(
        0.0, "with full: share of the parameters that stays, counted from the input", at_least=0, at_most=1
    )
    trainable_parameters: list[str] = arg(
        [], "with full: parameters that train all the same, by the beginnings of their names"
    )
    trainable_parameters_regex: str | None = arg(None, "the same by a regular expression")

    def check(self) -> Iterator[UserError]:
        lora_only = ("use_dora", "use_rslora", "lorap_lr_ratio", "target_parameters")
        for name in lora_only if self.tuner_type != "lora" else ():
            if getattr(self, name):
                yield UserError(f"--{name} is for --tuner_type lora, not {self.tuner_type}", f"drop --{name}")
        yield from check_freezing(self)
        if len(self.adapters) > 1:
            yield UserError("--adapters names several: one can be trained", "give one folder")
        if self.tuner_type == "adalora" and self.adalora_init_r < self.adalora_target_r:
            yield UserError(
                f"--adalora_init_r {self.adalora_init_r} is below --adalora_target_r {self.adalora_target_r}: ranks "
                "only fall",
                "raise --adalora_init_r",
            )
        if self.adapters and self.tuner_type in ("full", "llamapro", "adalora"):
            yield UserError(
                f"--adapters goes on with an adapter, and --tuner_type {self.tuner_type} does not",
                "drop one, or merge first with `swift export --merge_lora true`",
            )
        if self.target_regex and self.target_modules != ["all-linear"]:
            yield UserError(
                "--target_modules and --target_regex both say what gets adapters", "give one of them"
            )


def check_freezing(args: Arguments) -> Iterator[UserError]:
    """What the flags that freeze a part of a model ask for and cannot be."""
    frozen = ("freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio")
    thawed = ("trainable_parameters", "trainable_parameters_regex")
    given = [name for name in (*frozen, *thawed) if getattr(args, name)]
    for name in given if args.tuner_type != "full" else ():
        yield UserError(
            f"--{name} is for --tuner_type full; with {args.tuner_type} all but the adapters is frozen",
            "name whole modules to train with --modules_to_save",
        )
    if args.tuner_type == "full" and given and not any(name in frozen for name in given):
        yield UserError(
            f"--{given[0]} names what trains in spite of being frozen, and nothing is frozen",
            "add --freeze_parameters_ratio 1 to freeze all else",
        )
