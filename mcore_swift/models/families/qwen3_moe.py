"""Qwen3 mixture of experts: Qwen3's attention; a softmax router and experts in place of the MLP (arXiv:2505.09388)."""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.moe import (
    expert_config,
    expert_rules,
    layer_number,
    pre_mlp_norm_rule,
    router_rule,
)
from mcore_swift.models.families.qwen3 import Qwen3
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule


class Qwen3Moe(Qwen3):
    name = "qwen3_moe"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | expert_config(
            experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.moe_intermediate_size,
            sparse=[is_sparse(hf, number) for number in range(hf.num_hidden_layers)],
            renormalize=hf.norm_topk_prob,
        )

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), moe=is_sparse(hf, number))

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        if not is_sparse(hf, layer_number(hf_layer)):
            return super().mlp_rules(hf, mcore_layer, hf_layer)
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(f"{mcore_layer}.mlp", f"{hf_layer}.mlp"),
            *expert_rules(f"{mcore_layer}.mlp", f"{hf_layer}.mlp", hf.num_experts),
        ]


def is_sparse(hf: HFConfig, number: int) -> bool:
    """Whether a layer has experts: every `decoder_sparse_step`-th does, except those in mlp_only_layers."""
    return number not in hf.mlp_only_layers and (number + 1) % hf.decoder_sparse_step == 0


FAMILY = Qwen3Moe()
