"""OLMo 2: norms after attention and MLP, and over all query and all key heads together (arXiv:2501.00656)."""

from dataclasses import replace

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.qwen3 import head_norm_rules
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule


class Olmo2(Llama):
    name = "olmo2"
    norms = {
        "post_self_attn_layernorm.": "post_attention_layernorm",
        "post_mlp_layernorm.": "post_feedforward_layernorm",
    }

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), norms="post", qk_norm="full")

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        return super().attention_rules(hf, attention, hf_layer) + head_norm_rules(
            self, hf, attention, hf_layer
        )


FAMILY = Olmo2()
