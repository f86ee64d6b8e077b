"""Mixtral: Mistral's attention and eight experts, two of them per token (arXiv:2401.04088)."""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.mistral import Mistral
from mcore_swift.models.families.moe import expert_config, expert_rules, pre_mlp_norm_rule, router_rule
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule


class Mixtral(Mistral):
    name = "mixtral"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | expert_config(
            experts=hf.num_local_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.intermediate_size,
            sparse=[True] * hf.num_hidden_layers,
        )

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), moe=True)

    def unsupported(self, hf: HFConfig) -> list[str]:
        jitter = [f"router_jitter_noise {hf.router_jitter_noise}"] if hf.router_jitter_noise else []
        return super().unsupported(hf) + jitter

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        mcore, theirs = f"{mcore_layer}.mlp", f"{hf_layer}.block_sparse_moe"
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(mcore, theirs),
            *expert_rules(mcore, theirs, hf.num_local_experts, names=("w1", "w3", "w2")),
        ]


FAMILY = Mixtral()
