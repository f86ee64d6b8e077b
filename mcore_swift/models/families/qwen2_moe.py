"""Qwen1.5 and Qwen2 mixture of experts: Qwen2's attention, experts, and a shared expert with its own gate.

arXiv:2407.10671, section 2.2.2.
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.moe import (
    expert_config,
    expert_rules,
    layer_number,
    pre_mlp_norm_rule,
    router_rule,
    shared_expert_rules,
)
from mcore_swift.models.families.qwen2 import Qwen2
from mcore_swift.models.families.qwen3_moe import is_sparse
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule, Same


class Qwen2Moe(Qwen2):
    name = "qwen2_moe"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        experts = expert_config(
            experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.moe_intermediate_size,
            sparse=[is_sparse(hf, number) for number in range(hf.num_hidden_layers)],
            renormalize=hf.norm_topk_prob,
        )
        shared = {
            "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }
        return super().config(hf) | experts | shared

    def qkv_bias(self, hf: HFConfig) -> bool:
        return hf.qkv_bias

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), moe=is_sparse(hf, number))

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        if not is_sparse(hf, layer_number(hf_layer)):
            return super().mlp_rules(hf, mcore_layer, hf_layer)
        mcore, theirs = f"{mcore_layer}.mlp", f"{hf_layer}.mlp"
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(mcore, theirs),
            *expert_rules(mcore, theirs, hf.num_experts),
            *shared_expert_rules(mcore, f"{theirs}.shared_expert"),
            Same(f"{mcore}.shared_experts.gate_weight", (f"{theirs}.shared_expert_gate.weight",)),
        ]


FAMILY = Qwen2Moe()
