"""How transformers' model computes: compiled, with other kernels, with noise on its embeddings."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg

_RECOMPUTE = ("use_reentrant", "preserve_rng_state", "determinism_check")


@dataclasses.dataclass(kw_only=True)
class ComputeArguments(Arguments):
    TITLE: ClassVar[str] = "Computation of transformers' model"

    torch_compile: bool = arg(
        False, "compile each layer with torch.compile; needs a C++ compiler, or Triton on a GPU machine"
    )
    torch_compile_backend: str | None = arg(
        None,
        "what compiles",
        choices=("inductor", "aot_eager", "eager", "cudagraphs"),
        default_text="inductor",
    )
    use_liger_kernel: bool = arg(
        False,
        "Liger's Triton kernels for norms, rotary embedding and MLP, on a GPU; the loss is computed as ever",
    )
    neftune_noise_alpha: float | None = arg(
        None,
        "NEFTune: noise on the embeddings in training, uniform up to this over the root of length times width "
        "(arXiv:2310.05914); of packed rows, the length is the row's",
        above=0,
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = arg(
        None, 'settings of torch\'s checkpoint, JSON, beside {"use_reentrant": false}'
    )

    def compute_flags(self) -> list[str]:
        """Flags given here, which only transformers' model knows."""
        given = ("torch_compile", "use_liger_kernel", "neftune_noise_alpha", "gradient_checkpointing_kwargs")
        return [f"--{name}" for name in given if getattr(self, name)]

    def check(self) -> Iterator[UserError]:
        if self.torch_compile_backend and not self.torch_compile:
            yield UserError("--torch_compile_backend: nothing is compiled", "add --torch_compile true")
        settings = self.gradient_checkpointing_kwargs or {}
        for name in settings:
            if name not in _RECOMPUTE:
                yield UserError(
                    f"--gradient_checkpointing_kwargs: {name} is no setting",
                    f"known are {', '.join(_RECOMPUTE)}",
                )
        if settings and not getattr(self, "gradient_checkpointing", True):
            yield UserError(
                "--gradient_checkpointing_kwargs: nothing is computed again",
                "add --gradient_checkpointing true",
            )
        if getattr(self, "backend", "") == "megatron":
            for flag in self.compute_flags():
                yield UserError(
                    f"{flag} is for transformers' model, and --backend megatron has none", f"drop {flag}"
                )
