"""GLM-4.5 and its kin: grouped queries with a partial rotary embedding, DeepSeek-V3's router, shared experts.

arXiv:2508.06471, section 2.1.
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.moe import (
    biased_sigmoid_config,
    expert_bias_rule,
    expert_config,
    expert_rules,
    layer_number,
    pre_mlp_norm_rule,
    router_rule,
    shared_expert_rules,
    unsupported_groups,
)
from mcore_swift.models.families.multi_token import MultiToken
from mcore_swift.models.families.qwen3 import head_norm_rules
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule


class Glm4Moe(MultiToken, Llama):
    name = "glm4_moe"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        experts = expert_config(
            experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.moe_intermediate_size,
            sparse=[number >= hf.first_k_dense_replace for number in range(hf.num_hidden_layers)],
        )
        router = biased_sigmoid_config(
            groups=hf.n_group,
            top_groups=hf.topk_group,
            scaling=hf.routed_scaling_factor,
            shared_ffn=hf.n_shared_experts * hf.moe_intermediate_size,
        )
        return super().config(hf) | {"qk_layernorm": hf.use_qk_norm} | experts | router

    def output_bias(self, hf: HFConfig) -> bool:
        return False

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), moe=number >= hf.first_k_dense_replace)

    def unsupported(self, hf: HFConfig) -> list[str]:
        raw = [] if hf.norm_topk_prob else ["norm_topk_prob false"]
        return (
            super().unsupported(hf)
            + raw
            + unsupported_groups(hf.num_experts_per_tok, hf.n_group, hf.topk_group)
        )

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        norms = head_norm_rules(self, hf, attention, hf_layer) if hf.use_qk_norm else []
        return super().attention_rules(hf, attention, hf_layer) + norms

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        if layer_number(hf_layer) < hf.first_k_dense_replace:
            return super().mlp_rules(hf, mcore_layer, hf_layer)
        mcore, theirs = f"{mcore_layer}.mlp", f"{hf_layer}.mlp"
        shared = shared_expert_rules(mcore, f"{theirs}.shared_experts") if hf.n_shared_experts else []
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(mcore, theirs),
            expert_bias_rule(mcore, theirs),
            *expert_rules(mcore, theirs, hf.n_routed_experts),
            *shared,
        ]


FAMILY = Glm4Moe()
