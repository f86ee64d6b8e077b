"""Nemotron-4 and Minitron: LayerNorm with a weight stored around 0, an ungated MLP with squared ReLU, rotary embedding
on half of each head (arXiv:2402.16819, arXiv:2407.14679).
"""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import OuterTraits
from mcore_swift.models.norm import ZeroCentredLayerNorm


class Nemotron(Llama):
    name = "nemotron"
    mlp_names = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    gated = False

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=ZeroCentredLayerNorm)

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.norm_eps


FAMILY = Nemotron()
