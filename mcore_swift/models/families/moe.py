"""What mixture-of-experts families share: fields of TransformerConfig, and rules of expert weights."""

from collections.abc import Sequence
from typing import Any

from mcore_swift.models.rules import Experts, InFloat32, Rule, Same, Stacked

GATED = ("gate_proj", "up_proj", "down_proj")
"""What most checkpoints call the three matrices of a gated MLP."""


def expert_config(
    *, experts: int, top_k: int, ffn: int, sparse: Sequence[bool], renormalize: bool = True
) -> dict[str, Any]:
    """Fields of TransformerConfig for a softmax router.

    experts: number per layer. top_k: number per token. ffn: hidden size of one expert. sparse: for each layer of
    the model, whether it has experts. renormalize: whether the chosen experts' weights sum to one (the same as a
    softmax over them alone); else they are those of the softmax over all experts.
    """
    return {
        "num_moe_experts": experts,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": ffn,
        "moe_layer_freq": [int(layer) for layer in sparse],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not renormalize,
    }


def biased_sigmoid_config(
    *, groups: int = 1, top_groups: int = 1, scaling: float = 1.0, shared_ffn: int | None = None
) -> dict[str, Any]:
    """What DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2) changes in `expert_config`.

    Scores are sigmoids. A bias without gradient is added for the choice of experts only, and is moved after each step
    to even out the load. The chosen scores are normalised to sum to one, then multiplied by `scaling`. groups: number
    of groups of experts; a token takes its experts from the best `top_groups` of them. shared_ffn: hidden size of all
    shared experts together.
    """
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": scaling,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": top_groups if groups > 1 else None,
        "moe_shared_expert_intermediate_size": shared_ffn or None,
    }


def unsupported_groups(top_k: int, groups: int, top_groups: int) -> list[str]:
    """Unsupported: transformers scores a group by its 2 best experts, megatron-core by `top_k // top_groups`."""
    if groups > 1 and top_k // top_groups != 2:
        return [
            f"num_experts_per_tok {top_k} with topk_group {top_groups} (only twice as many experts as groups)"
        ]
    return []


def expert_rules(mcore_mlp: str, hf_mlp: str, experts: int, names: Sequence[str] = GATED) -> list[Rule]:
    """Rules of a layer's routed experts: one HF tensor per matrix, or all experts in one (transformers 5).

    mcore_mlp: prefix such as 'decoder.layers.3.mlp'. hf_mlp: prefix of `experts`, such as 'model.layers.3.mlp'.
    names: HF names of the gate, up and down matrices of one expert.
    """
    gate, up, down = names

    def of_each(*parts: str) -> tuple[str, ...]:
        return tuple(f"{hf_mlp}.experts.{e}.{part}.weight" for e in range(experts) for part in parts)

    prefix, fused = f"{mcore_mlp}.experts.experts", f"{hf_mlp}.experts"
    return [
        Experts(f"{prefix}.linear_fc1.weight", of_each(gate, up), parts=2, fused=f"{fused}.gate_up_proj"),
        Experts(f"{prefix}.linear_fc2.weight", of_each(down), fused=f"{fused}.down_proj"),
    ]


def layer_number(layer: str) -> int:
    """'model.layers.3' -> 3."""
    return int(layer.rpartition(".")[2])


def pre_mlp_norm_rule(mcore_layer: str, hf_layer: str) -> Rule:
    """The norm before router and experts, a separate module; the one before a dense MLP is part of a linear layer."""
    return Same(f"{mcore_layer}.pre_mlp_layernorm.weight", (f"{hf_layer}.post_attention_layernorm.weight",))


def router_rule(mcore_mlp: str, hf_mlp: str) -> Rule:
    return Same(f"{mcore_mlp}.router.weight", (f"{hf_mlp}.gate.weight",))


def expert_bias_rule(mcore_mlp: str, hf_mlp: str) -> Rule:
    return InFloat32(f"{mcore_mlp}.router.expert_bias", (f"{hf_mlp}.gate.e_score_correction_bias",))


def shared_expert_rules(mcore_mlp: str, hf_expert: str, names: Sequence[str] = GATED) -> list[Rule]:
    """Rules of the expert that every token goes to. hf_expert: such as 'model.layers.3.mlp.shared_expert'."""
    gate, up, down = (f"{hf_expert}.{name}.weight" for name in names)
    prefix = f"{mcore_mlp}.shared_experts"
    return [Stacked(f"{prefix}.linear_fc1.weight", (gate, up)), Same(f"{prefix}.linear_fc2.weight", (down,))]
