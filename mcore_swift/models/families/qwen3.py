"""Qwen3 dense: Llama's layers with RMSNorm on each query and key head (arXiv:2505.09388)."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.qwen2 import Qwen2
from mcore_swift.models.family import HFConfig
from mcore_swift.models.rules import Norm, Rule


class Qwen3(Qwen2):
    name = "qwen3"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"qk_layernorm": True}

    def qkv_bias(self, hf: HFConfig) -> bool:
        return Llama.qkv_bias(self, hf)

    def output_bias(self, hf: HFConfig) -> bool:
        return Llama.output_bias(self, hf)

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        return super().attention_rules(hf, attention, hf_layer) + head_norm_rules(
            self, hf, attention, hf_layer
        )


def head_norm_rules(family: Llama, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
    """Rules of the query and key norms."""
    initial = family.outer(hf).norm.initial
    return [
        Norm(
            f"{attention}.{part}_layernorm.weight",
            (f"{hf_layer}.self_attn.{part}_norm.weight",),
            initial=initial,
        )
        for part in "qk"
    ]


FAMILY = Qwen3()
