"""GLM-4-0414: GLM with norms on both sides of attention and MLP (arXiv:2406.12793)."""

from dataclasses import replace

from mcore_swift.models.families.glm import Glm
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Glm4(Glm):
    name = "glm4"
    norms = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm",
        "post_self_attn_layernorm.": "post_self_attn_layernorm",
        "mlp.linear_fc1.layer_norm_": "post_attention_layernorm",
        "post_mlp_layernorm.": "post_mlp_layernorm",
    }

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), norms="sandwich")


FAMILY = Glm4()
