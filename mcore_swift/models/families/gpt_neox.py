"""GPT-NeoX and Pythia: attention and MLP in parallel with a LayerNorm each, an ungated MLP with GELU, biases, rotary
embedding on a part of each head (arXiv:2204.06745, arXiv:2304.01373).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits
from mcore_swift.models.norm import LayerNorm
from mcore_swift.models.rules import Rule, Same


class GptNeoX(Llama):
    name = "gpt_neox"
    attention_names = {"qkv": "attention.query_key_value", "output": "attention.dense"}
    mlp_names = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
    outer_names = {
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    }
    hf_layers = "gpt_neox.layers"
    gated = False

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"hidden_dropout": hf.hidden_dropout}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), parallel="two_norms" if hf.use_parallel_residual else None)

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=LayerNorm, embedding_dropout=hf.hidden_dropout)

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.layer_norm_eps

    def mlp_bias(self, hf: HFConfig) -> bool:
        return True

    def qkv_rule(self, hf: HFConfig, attention: str, hf_layer: str, kind: str) -> Rule:
        # query, key and value of each head are adjacent, as in megatron-core
        return Same(f"{attention}.linear_qkv.{kind}", (f"{hf_layer}.{self.attention_names['qkv']}.{kind}",))

    def optional_hf(self, hf: HFConfig) -> list[str]:
        buffers = ("rotary_emb.inv_freq", "bias", "masked_bias")
        return super().optional_hf(hf) + [
            f"{self.hf_layers}.{number}.attention.{name}"
            for number in range(hf.num_hidden_layers)
            for name in buffers
        ]


FAMILY = GptNeoX()
