"""Gemma 3, text: Gemma 2 with norms on query and key heads in place of the soft cap on scores, and a different rotary
embedding in the layers with a sliding window (arXiv:2503.19786).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.gemma2 import Gemma2
from mcore_swift.models.families.qwen3 import head_norm_rules
from mcore_swift.models.family import HFConfig
from mcore_swift.models.frequencies import Frequencies
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Types of layer, in the order of their rotary embeddings."""


class Gemma3(Gemma2):
    name = "gemma3"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"qk_layernorm": True}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), rotary=LAYER_TYPES.index(hf.layer_types[number]))

    def rotary(self, hf: HFConfig) -> list[Frequencies]:
        return [Frequencies(hf, layer_type) for layer_type in LAYER_TYPES]

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        return super().attention_rules(hf, attention, hf_layer) + head_norm_rules(
            self, hf, attention, hf_layer
        )


FAMILY = Gemma3()
