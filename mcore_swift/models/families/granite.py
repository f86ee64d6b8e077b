"""Granite 3 dense: Llama's layers with multipliers on embeddings, attention scores, residual branches and logits
(from maximal update parametrization, arXiv:2203.03466).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits


class Granite(Llama):
    name = "granite"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"softmax_scale": hf.attention_multiplier}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), residual_scale=hf.residual_multiplier)

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(embedding_scale=hf.embedding_multiplier, logit_scale=1 / hf.logits_scaling)


FAMILY = Granite()
