"""DeepSeek-V3, R1 (arXiv:2412.19437) and models with their architecture: a sigmoid router, multi-token layers."""

from typing import Any

from mcore_swift.models.families.deepseek_v2 import DeepseekV2, first_sparse
from mcore_swift.models.families.moe import expert_bias_rule, layer_number
from mcore_swift.models.families.multi_token import MultiToken
from mcore_swift.models.family import HFConfig
from mcore_swift.models.rules import Rule


class DeepseekV3(MultiToken, DeepseekV2):
    name = "deepseek_v3"

    def expert_config(self, hf: HFConfig) -> dict[str, Any]:
        return super().expert_config(hf) | {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        }

    def chooses_groups(self, hf: HFConfig) -> bool:
        return (hf.topk_group or 1) < (hf.n_group or 1)

    def best_of_group(self, hf: HFConfig) -> int | None:
        return 2

    def unsupported_router(self, hf: HFConfig) -> list[str]:
        wrong = []
        if getattr(hf, "scoring_func", "sigmoid") != "sigmoid":
            wrong.append(f"scoring_func {hf.scoring_func!r}")
        if getattr(hf, "topk_method", "noaux_tc") != "noaux_tc":
            wrong.append(f"topk_method {hf.topk_method!r}")
        if not hf.norm_topk_prob:
            wrong.append("norm_topk_prob false")
        return wrong

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        rules = super().mlp_rules(hf, mcore_layer, hf_layer)
        if layer_number(hf_layer) >= first_sparse(hf):
            rules.append(expert_bias_rule(f"{mcore_layer}.mlp", f"{hf_layer}.mlp"))
        return rules


FAMILY = DeepseekV3()
