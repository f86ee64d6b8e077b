"""DeepSeek-V2 (arXiv:2405.04434): latent attention; after some dense layers, routed and shared experts."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.moe import (
    expert_config,
    expert_rules,
    layer_number,
    pre_mlp_norm_rule,
    router_rule,
    shared_expert_rules,
)
from mcore_swift.models.family import HFConfig
from mcore_swift.models.frequencies import rope_parameters
from mcore_swift.models.layer import Latent, LayerTraits
from mcore_swift.models.rules import Rule, Same


class DeepseekV2(Llama):
    name = "deepseek_v2"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        fields = super().config(hf) | latent_config(hf)
        return fields | (self.expert_config(hf) if first_sparse(hf) < hf.num_hidden_layers else {})

    def expert_config(self, hf: HFConfig) -> dict[str, Any]:
        """Fields of TransformerConfig for the layers with experts."""
        layers = range(hf.num_hidden_layers)
        grouped = self.chooses_groups(hf)
        return expert_config(
            experts=hf.n_routed_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.moe_intermediate_size,
            sparse=[number >= first_sparse(hf) for number in layers],
            renormalize=False,
        ) | {
            "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
            "moe_router_num_groups": hf.n_group if grouped else None,
            "moe_router_group_topk": hf.topk_group if grouped else None,
            "moe_shared_expert_intermediate_size": hf.moe_intermediate_size * hf.n_shared_experts or None,
        }

    def chooses_groups(self, hf: HFConfig) -> bool:
        """Whether a token first chooses some groups of experts. (With one group, or all chosen, there is no choice.)"""
        return hf.topk_method == "group_limited_greedy" and hf.topk_group < hf.n_group

    def best_of_group(self, hf: HFConfig) -> int | None:
        return 1

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        interleaved = getattr(hf, "rope_interleave", True)
        return LayerTraits(latent=Latent(interleaved=interleaved), moe=number >= first_sparse(hf))

    def unsupported(self, hf: HFConfig) -> list[str]:
        wrong = [f"{name} true" for name in ("attention_bias", "mlp_bias") if getattr(hf, name, False)]
        if getattr(hf, "moe_layer_freq", 1) != 1:
            wrong.append(f"moe_layer_freq {hf.moe_layer_freq}")
        return wrong + self.unsupported_router(hf)

    def unsupported_router(self, hf: HFConfig) -> list[str]:
        wrong = []
        if hf.topk_method not in ("greedy", "group_limited_greedy"):
            wrong.append(f"topk_method {hf.topk_method!r}")
        if hf.norm_topk_prob:  # transformers ignores it; DeepSeek's own code then omits the scaling factor
            wrong.append("norm_topk_prob true")
        return wrong

    def layer_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        return [*latent_rules(hf, mcore_layer, hf_layer), *self.mlp_rules(hf, mcore_layer, hf_layer)]

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        if layer_number(hf_layer) < first_sparse(hf):
            return super().mlp_rules(hf, mcore_layer, hf_layer)
        mcore, theirs = f"{mcore_layer}.mlp", f"{hf_layer}.mlp"
        shared = shared_expert_rules(mcore, f"{theirs}.shared_experts") if hf.n_shared_experts else []
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            router_rule(mcore, theirs),
            *expert_rules(mcore, theirs, hf.n_routed_experts),
            *shared,
        ]


def first_sparse(hf: HFConfig) -> int:
    """Number of the first layer with experts."""
    return hf.first_k_dense_replace or 0


def latent_config(hf: HFConfig) -> dict[str, Any]:
    """Fields of MLATransformerConfig."""
    rope = rope_parameters(hf)
    scaled = rope["rope_type"] != "default"
    return {
        "multi_latent_attention": True,
        "num_query_groups": hf.num_attention_heads,
        "kv_channels": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        # These two determine only the scale of the scores.
        "rotary_scaling_factor": rope["factor"] if scaled else 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def latent_rules(hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
    """Rules of the norm before latent attention and of its projections and norms."""
    query = (
        {"linear_q_proj.weight": "q_proj"}
        if hf.q_lora_rank is None
        else {
            "linear_q_down_proj.weight": "q_a_proj",
            "linear_q_up_proj.layer_norm_weight": "q_a_layernorm",
            "linear_q_up_proj.weight": "q_b_proj",
        }
    )
    names = query | {
        "linear_kv_down_proj.weight": "kv_a_proj_with_mqa",
        "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm",
        "linear_kv_up_proj.weight": "kv_b_proj",
        "linear_proj.weight": "o_proj",
    }
    return [
        Same(f"{mcore_layer}.input_layernorm.weight", (f"{hf_layer}.input_layernorm.weight",)),
        *[
            Same(f"{mcore_layer}.self_attention.{ours}", (f"{hf_layer}.self_attn.{theirs}.weight",))
            for ours, theirs in names.items()
        ],
    ]


FAMILY = DeepseekV2()
