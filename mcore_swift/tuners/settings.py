"""The settings of a LoRA adapter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv:2106.09685): W x + scaling * B A x, with W frozen.

    rank: columns of B, rows of A. use_rslora: scale by alpha / sqrt(rank) (arXiv:2312.03732) and not alpha / rank.
    target_modules: HF module names or ends of them, megatron-core module names, or 'all-linear'.
    target_regex: matches whole HF module names; replaces target_modules.
    use_dora: train magnitude and direction of each row of W separately (arXiv:2402.09353).
    rank_pattern, alpha_pattern: different values for single HF modules, by full name.
    init: initialization of A and B: 'true' (peft's default), 'gaussian' or 'orthogonal'; B A is zero in each case.
    modules_to_save: ends of names of HF modules trained in full. bias: biases that train: 'none', 'all', or
    'lora_only' for those of layers with adapters.
    ensure_weight_tying: a trained embedding stays tied to the output layer; None: as in the model.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)
    target_regex: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    ensure_weight_tying: bool | None = None
    init: str = "true"
    seed: int = 42

    @classmethod
    def from_args(cls, args: Any) -> "LoraSettings":
        """From the flags of a command."""
        return cls(
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            target_modules=tuple(args.target_modules),
            target_regex=args.target_regex,
            modules_to_save=tuple(args.modules_to_save),
            bias=args.lora_bias,
            init=args.init_weights,
            seed=args.seed,
        )

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
