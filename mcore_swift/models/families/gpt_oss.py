"""gpt-oss (arXiv:2508.10925): attention sinks, sliding windows in every other layer, experts with biases, clamps."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.moe import expert_config, pre_mlp_norm_rule
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import Rule, Same, TurnedExperts


class GptOss(Llama):
    name = "gpt_oss"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        # here, since reading a model must not need megatron-core
        from megatron.core.fusions.fused_bias_geglu import quick_gelu

        experts = expert_config(
            experts=hf.num_local_experts,
            top_k=hf.num_experts_per_tok,
            ffn=hf.intermediate_size,
            sparse=[True] * hf.num_hidden_layers,
        )
        return (
            super().config(hf)
            | experts
            | {
                "add_bias_linear": True,
                # silu(1.702 x) / 1.702 of the clamped gate, times the clamped rest plus one
                "activation_func": quick_gelu,
                "activation_func_clamp_value": hf.swiglu_limit,
                "glu_linear_offset": 1.0,
                "softmax_type": "learnable",
            }
        )

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        window = hf.sliding_window if hf.layer_types[number] == "sliding_attention" else None
        return LayerTraits(window=window, sinks=True, moe=True)

    def unsupported(self, hf: HFConfig) -> list[str]:
        wrong = []
        if getattr(hf, "swiglu_alpha", 1.702) != 1.702:
            wrong.append(f"swiglu_alpha {hf.swiglu_alpha}")
        if not hf.attention_bias:
            wrong.append("attention_bias false")
        return wrong

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        sinks = Same(f"{attention}.core_attention.softmax_offset", (f"{hf_layer}.self_attn.sinks",))
        return [*super().attention_rules(hf, attention, hf_layer), sinks]

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        router, experts = f"{mcore_layer}.mlp.router", f"{mcore_layer}.mlp.experts.experts"
        theirs = f"{hf_layer}.mlp.experts"
        return [
            pre_mlp_norm_rule(mcore_layer, hf_layer),
            *[Same(f"{router}.{kind}", (f"{hf_layer}.mlp.router.{kind}",)) for kind in ("weight", "bias")],
            TurnedExperts(f"{experts}.linear_fc1.weight", (f"{theirs}.gate_up_proj",), parts=2),
            TurnedExperts(f"{experts}.linear_fc1.bias", (f"{theirs}.gate_up_proj_bias",), parts=2),
            TurnedExperts(f"{experts}.linear_fc2.weight", (f"{theirs}.down_proj",)),
            TurnedExperts(f"{experts}.linear_fc2.bias", (f"{theirs}.down_proj_bias",)),
        ]


FAMILY = GptOss()
