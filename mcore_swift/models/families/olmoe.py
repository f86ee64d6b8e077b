"""OLMoE: norms over all query and all key heads together, experts in every layer (arXiv:2409.02060)."""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.moe import expert_config, expert_rules, pre_mlp_norm_rule, router_rule
from mcore_swift.models.families.qwen3 import head_norm_rules
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule


class Olmoe(Llama):
    name = "olmoe"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | expert_config(
            experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.intermediate_size,
            sparse=[True] * hf.num_hidden_layers,
            renormalize=hf.norm_topk_prob,
        )

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), qk_norm="full", moe=True)

    def unsupported(self, hf: HFConfig) -> list[str]:
        clipped = [] if hf.clip_qkv is None else [f"clip_qkv {hf.clip_qkv}"]
        return super().unsupported(hf) + clipped

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        return super().attention_rules(hf, attention, hf_layer) + head_norm_rules(
            self, hf, attention, hf_layer
        )

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        mcore, theirs = f"{mcore_layer}.mlp", f"{hf_layer}.mlp"
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(mcore, theirs),
            *expert_rules(mcore, theirs, hf.num_experts),
        ]


FAMILY = Olmoe()
