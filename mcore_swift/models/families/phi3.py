"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layers, stored with query, key and value in one tensor, and gate and
up in another; LongRoPE for long texts (arXiv:2404.14219, arXiv:2402.13753).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Phi3(Llama):
    name = "phi3"
    attention_names = {"qkv": "self_attn.qkv_proj", "output": "self_attn.o_proj"}
    mlp_names = {"up": "mlp.gate_up_proj", "down": "mlp.down_proj"}

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"hidden_dropout": hf.resid_pdrop}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), window=getattr(hf, "sliding_window", None))


FAMILY = Phi3()
