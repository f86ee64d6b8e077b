"""Gemma 2: Gemma with norms on both sides of attention and MLP, every other layer with a sliding window, and soft
caps on attention scores and logits (arXiv:2408.00118).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.gemma import Gemma
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Gemma2(Gemma):
    name = "gemma2"
    norms = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm",
        "post_self_attn_layernorm.": "post_attention_layernorm",
        "mlp.linear_fc1.layer_norm_": "pre_feedforward_layernorm",
        "post_mlp_layernorm.": "post_feedforward_layernorm",
    }

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"softmax_scale": hf.query_pre_attn_scalar**-0.5}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(
            super().layer(hf, number),
            norms="sandwich",
            window=sliding_window(hf, number),
            softcap=getattr(hf, "attn_logit_softcapping", None),
        )


FAMILY = Gemma2()
