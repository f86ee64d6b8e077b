"""Which parameters train: all, some, or adapters beside frozen ones."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_NOT_IN_PEFT = "peft has no such tuner"


@dataclasses.dataclass(kw_only=True)
class TunerArguments(Arguments):
    TITLE: ClassVar[str] = "What trains"

    tuner_type: str = arg(
        "lora",
        "adapters of this kind, or all parameters (full)",
        choices=("full", "lora"),
        refused=dict.fromkeys(("lora_llm", "longlora", "llamapro", "adapter", "reft", "bone"), _NOT_IN_PEFT),
    )

    def check(self) -> Iterator[UserError]:
        if self.tuner_type != "full":
            yield UserError(
                f"--tuner_type {self.tuner_type}: adapters are not supported yet", "add --tuner_type full"
            )
