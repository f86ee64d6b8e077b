"""How a transformers model computes: torch.compile, Liger kernels, NEFTune, recomputation."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_RECOMPUTE = ("use_reentrant", "preserve_rng_state", "determinism_check")


@dataclasses.dataclass(kw_only=True)
class ComputeArguments(Arguments):
    TITLE: ClassVar[str] = "Computation of transformers models"

    torch_compile: bool = arg(
        False, "compile each layer with torch.compile; needs a C++ compiler, or Triton on a GPU machine"
    )
    torch_compile_backend: str | None = arg(
        None,
        "compiler of --torch_compile",
        choices=("inductor", "aot_eager", "eager", "cudagraphs"),
        default_text="inductor",
    )
    use_liger_kernel: bool = arg(
        False,
        "use Liger's Triton kernels for norms, rotary embedding and MLP, on a GPU; the loss is not affected",
    )
    neftune_noise_alpha: float | None = arg(
        None,
        "NEFTune (arXiv:2310.05914): add uniform noise to the embeddings during training, at most this value / "
        "sqrt(length * width); for packed rows, the length is that of the row",
        above=0,
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = arg(
        None, 'arguments of torch.utils.checkpoint as JSON; they override {"use_reentrant": false}'
    )

    def compute_flags(self) -> list[str]:
        """The given flags of this group; only transformers models support them."""
        given = ("torch_compile", "use_liger_kernel", "neftune_noise_alpha", "gradient_checkpointing_kwargs")
        return [f"--{name}" for name in given if getattr(self, name)]

    def check(self) -> Iterator[UserError]:
        if self.torch_compile_backend and not self.torch_compile:
            yield UserError("--torch_compile_backend: nothing is compiled", "add --torch_compile true")
        settings = self.gradient_checkpointing_kwargs or {}
        for name in settings:
            if name not in _RECOMPUTE:
                yield UserError(
                    f"--gradient_checkpointing_kwargs: {name} is not supported",
                    f"choose from {', '.join(_RECOMPUTE)}",
                )
        if settings and not getattr(self, "gradient_checkpointing", True):
            yield UserError(
                "--gradient_checkpointing_kwargs: nothing is recomputed",
                "add --gradient_checkpointing true",
            )
        if getattr(self, "backend", "") == "megatron":
            for flag in self.compute_flags():
                yield UserError(
                    f"{flag} is for transformers models, and not supported with --backend megatron",
                    f"drop {flag}",
                )
