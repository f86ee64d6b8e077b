"""Frequencies of the rotary embedding, as transformers defines them.

Scaled ones come from transformers' own table of initialisers, so that every scaling we accept (linear, Llama 3) is
the same to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

from mcore_swift.errors import UserError

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


def rope_parameters(hf: Any) -> dict[str, Any]:
    """The rope settings of a HF config, of transformers 5 (`rope_parameters`) or before (`rope_scaling`)."""
    settings = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    return {"rope_type": settings.get("type", "default"), **settings}


def inverse_frequencies(hf: Any) -> Tensor:
    """Angle per position of each pair of dimensions, fp32 `[head_dim / 2]`.

    Raises UserError for a kind of scaling that is not supported.
    """
    settings = rope_parameters(hf)
    kind = settings["rope_type"]
    if kind not in SUPPORTED_ROPE_TYPES:
        raise UserError(
            f"the checkpoint's config.json asks for rope scaling of type {kind!r}, which is not supported",
            remedy=f"supported rope types: {', '.join(SUPPORTED_ROPE_TYPES)}",
        )
    if kind == "default":
        dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        base = settings.get("rope_theta") or getattr(hf, "rope_theta", None) or 10000.0
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return frequencies
