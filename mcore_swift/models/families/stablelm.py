"""StableLM 2 and StableLM-3B: LayerNorm with bias, rotary embedding on a quarter of each head (arXiv:2402.17834)."""

from dataclasses import replace

from mcore_swift.models.families.llama import BEFORE_MLP, Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits
from mcore_swift.models.norm import LayerNorm
from mcore_swift.models.rules import Rule


class StableLm(Llama):
    name = "stablelm"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), parallel="one_norm" if hf.use_parallel_residual else None)

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=LayerNorm)

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        rules = super().mlp_rules(hf, mcore_layer, hf_layer)
        shared = [rule for rule in rules if BEFORE_MLP in rule.mcore] if hf.use_parallel_residual else []
        return [rule for rule in rules if rule not in shared]

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.layer_norm_eps

    def qkv_bias(self, hf: HFConfig) -> bool:
        return hf.use_qkv_bias

    def output_bias(self, hf: HFConfig) -> bool:
        return False

    def unsupported(self, hf: HFConfig) -> list[str]:
        wrong = ["qk_layernorm true (a tensor for each head)"] if hf.qk_layernorm else []
        dropout = [f"hidden_dropout {hf.hidden_dropout} (only 0)"] if hf.hidden_dropout else []
        return super().unsupported(hf) + wrong + dropout


FAMILY = StableLm()
