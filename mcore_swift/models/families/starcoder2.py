"""StarCoder2: LayerNorm with bias, an ungated MLP with GELU, biases throughout (arXiv:2402.19173)."""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits
from mcore_swift.models.norm import LayerNorm


class Starcoder2(Llama):
    name = "starcoder2"
    mlp_names = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    gated = False

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"hidden_dropout": hf.residual_dropout}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), window=getattr(hf, "sliding_window", None))

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=LayerNorm, embedding_dropout=hf.embedding_dropout)

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.norm_epsilon

    def qkv_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias

    def output_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias

    def mlp_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias


FAMILY = Starcoder2()
