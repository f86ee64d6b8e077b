"""Frequencies of the rotary embedding, as transformers defines them.

Scaled frequencies come from transformers' own table of initialisers, so they equal transformers' bit for bit. Most do
not depend on the text; those of LongRoPE (arXiv:2402.13753) and dynamic NTK scaling depend on its length, which here is
the length of each sample, packed or not.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mcore_swift.errors import UserError

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


def rope_parameters(hf: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings of a HF config, from transformers 5 (`rope_parameters`) or earlier (`rope_scaling`).

    layer_type: which settings to take from a config that has some for each type of layer.
    """
    settings = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    if layer_type is not None:
        settings = settings[layer_type]
    return {"rope_type": settings.get("type", "default"), **settings}


class Frequencies:
    """A rotary embedding: the angle per position of each pair of dimensions, for a text of a given length.

    attention_factor: factor on cosine and sine (YaRN, arXiv:2309.00071; LongRoPE).
    by_length: whether the angles depend on the length of the text.

    Raises UserError for a kind of scaling that is not supported.
    """

    def __init__(self, hf: Any, layer_type: str | None = None) -> None:
        self.hf, self.layer_type = hf, layer_type
        self.settings = rope_parameters(hf, layer_type)
        self.kind = self.settings["rope_type"]
        if self.kind not in SUPPORTED_ROPE_TYPES:
            raise UserError(
                f"the checkpoint's config.json asks for rope scaling of type {self.kind!r}, which is not supported",
                remedy=f"supported rope types: {', '.join(SUPPORTED_ROPE_TYPES)}",
            )
        self.by_length = self.kind in ("longrope", "dynamic")
        self.attention_factor = float(self._compute(None)[1])

    def regime(self, length: int) -> int:
        """A length that represents all text lengths with the same angles as `length`."""
        if self.kind == "longrope":
            limit = self.settings["original_max_position_embeddings"]
            return limit + 1 if length > limit else limit
        return max(length, self.hf.max_position_embeddings) if self.kind == "dynamic" else 0

    def at(self, length: int) -> Tensor:
        """Angle per position of each pair of dimensions in a text of `length` tokens: fp32 `[rotary dim / 2]`."""
        return self._compute(length if self.by_length else None)[0]

    def _compute(self, length: int | None) -> tuple[Tensor, float]:
        if self.kind == "default":
            return self._default(), 1.0
        if (
            self.kind == "dynamic"
            and self.settings.get("alpha")
            and (length or 0) <= self.hf.max_position_embeddings
        ):
            return self._default(self.settings["alpha"]), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        named = {} if self.layer_type is None else {"layer_type": self.layer_type}
        return ROPE_INIT_FUNCTIONS[self.kind](self.hf, torch.device("cpu"), seq_len=length, **named)

    def _default(self, alpha: float = 1.0) -> Tensor:
        """As `at`, without scaling. alpha: Hunyuan's factor on the base, for texts within max_position_embeddings."""
        head_dim = getattr(self.hf, "head_dim", None) or self.hf.hidden_size // self.hf.num_attention_heads
        share = self.settings.get("partial_rotary_factor") or getattr(self.hf, "partial_rotary_factor", None)
        dim = math.floor(head_dim * (share or 1.0))
        base = self.settings.get("rope_theta") or getattr(self.hf, "rope_theta", None) or 10000.0
        base = base * alpha ** (dim / (dim - 2)) if alpha != 1.0 else base
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
