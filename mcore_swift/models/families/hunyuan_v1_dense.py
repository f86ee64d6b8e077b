"""Hunyuan dense (0.5B to 7B): Llama's layers with norms on query and key heads after the rotary embedding
(https://github.com/Tencent-Hunyuan).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Norm, Rule


class Hunyuan(Llama):
    name = "hunyuan_v1_dense"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"qk_layernorm": True}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), qk_norm="turned")

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        return super().attention_rules(hf, attention, hf_layer) + [
            Norm(
                f"{attention}.core_attention.{part[0]}_layernorm.weight",
                (f"{hf_layer}.self_attn.{part}_layernorm.weight",),
            )
            for part in ("query", "key")
        ]


FAMILY = Hunyuan()
