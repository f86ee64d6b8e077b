"""Command R and R+: attention and MLP in parallel after one LayerNorm without bias, rotary pairs of adjacent
dimensions, scaled logits (https://cohere.com/blog/command-r, transformers' CohereForCausalLM).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.qwen3 import head_norm_rules
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits
from mcore_swift.models.norm import LayerNormWithoutBias
from mcore_swift.models.rules import Rule


class Cohere(Llama):
    name = "cohere"
    norms = {"self_attention.linear_qkv.layer_norm_": "input_layernorm"}

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"rotary_interleaved": True}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        qk_norm = "each" if getattr(hf, "use_qk_norm", False) else None
        return replace(super().layer(hf, number), parallel="one_norm", qk_norm=qk_norm)

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=LayerNormWithoutBias, logit_scale=hf.logit_scale)

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.layer_norm_eps

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        norms = getattr(hf, "use_qk_norm", False)
        return super().attention_rules(hf, attention, hf_layer) + (
            head_norm_rules(self, hf, attention, hf_layer) if norms else []
        )


FAMILY = Cohere()
