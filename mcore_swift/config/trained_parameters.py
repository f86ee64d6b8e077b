"""Which parameters train: the flags that `swift` and `megatron` share, for adapters and for frozen parts."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

FREEZING = ("freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio")
THAWING = ("trainable_parameters", "trainable_parameters_regex")


@dataclasses.dataclass(kw_only=True)
class TrainedParametersArguments(Arguments):
    """The flags whose meaning does not depend on the engine; a subclass adds `tuner_type` and what differs."""

    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg("full", "what trains: all parameters (full) or adapters of the named kind")
    adapters: list[str] = arg(
        [], "PEFT folder of the adapter to continue training; its own settings override those of the command"
    )
    target_regex: str | None = arg(
        None, "modules that get an adapter, as a regular expression for the full module name", is_regex=True
    )
    modules_to_save: list[str] = arg(
        [],
        "modules trained in full beside the adapters, by the end of their Hugging Face name (embed_tokens, lm_head, "
        "norm, mlp.gate); tied weights stay tied",
    )
    lora_rank: int = arg(8, "rank of the adapters: rows of A, columns of B", at_least=1)
    lora_dropout: float = arg(0.05, "dropout probability on the adapters' input", at_least=0, below=1)
    lora_bias: str = arg(
        "none",
        "biases that train as well: all of the model's, or those of layers with adapters (lora_only)",
        choices=("none", "all", "lora_only"),
    )
    use_rslora: bool = arg(
        False, "rsLoRA: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)"
    )
    use_dora: bool = arg(
        False,
        "DoRA: the adapter sets the direction of each weight row, a trained vector its norm (arXiv:2402.09353)",
    )
    lorap_lr_ratio: float | None = arg(
        None, "LoRA+: learning rate of B as a multiple of the base learning rate (arXiv:2402.12354)", above=0
    )
    freeze_parameters: list[str] = arg(
        [], "with full: parameters to freeze, by the beginning of their Hugging Face name"
    )
    freeze_parameters_regex: str | None = arg(
        None,
        "with full: parameters to freeze, as a regular expression searched for in their Hugging Face name",
        is_regex=True,
    )
    freeze_parameters_ratio: float = arg(
        0.0, "with full: fraction of the parameters to freeze, counted from the input", at_least=0, at_most=1
    )
    trainable_parameters: list[str] = arg(
        [],
        "with full: parameters that train although another flag freezes them, by the beginning of their name",
    )
    trainable_parameters_regex: str | None = arg(
        None, "with full: the same, as a regular expression searched for in their name", is_regex=True
    )

    def check(self) -> Iterator[UserError]:
        yield from self._check_freezing()
        if len(self.adapters) > 1:
            yield UserError(
                f"--adapters names {len(self.adapters)} folders: one adapter can be trained",
                "give one folder",
            )

    def _check_freezing(self) -> Iterator[UserError]:
        given = [name for name in (*FREEZING, *THAWING) if getattr(self, name)]
        if self.tuner_type != "full":
            for name in given:
                yield UserError(
                    f"--{name} is for --tuner_type full; with {self.tuner_type} everything but the adapters is frozen",
                    "use --modules_to_save to train whole modules",
                )
        elif given and not any(name in FREEZING for name in given):
            yield UserError(
                f"--{given[0]} exempts parameters from freezing, and nothing is frozen",
                "add --freeze_parameters_ratio 1 to freeze everything else",
            )
