"""Qwen3 dense: Llama's layers with RMSNorm on each query and key head (arXiv:2505.09388)."""

from typing import Any

from mcore_swift.models.families.qwen2 import Qwen2
from mcore_swift.models.family import HFConfig
from mcore_swift.models.rules import Rule, Same


class Qwen3(Qwen2):
    name = "qwen3"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"qk_layernorm": True}

    def qkv_bias(self, hf: HFConfig) -> bool:
        return False

    def layer_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        return super().layer_rules(hf, mcore_layer, hf_layer) + [
            Same(
                f"{mcore_layer}.self_attention.{part}_layernorm.weight",
                (f"{hf_layer}.self_attn.{part}_norm.weight",),
            )
            for part in "qk"
        ]


FAMILY = Qwen3()
