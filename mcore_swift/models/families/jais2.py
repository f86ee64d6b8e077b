"""Jais 2: Llama's layers with LayerNorm, an ungated MLP with squared ReLU, and biases
(https://huggingface.co/inceptionai/Jais-2-8B-Chat).
"""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import OuterTraits
from mcore_swift.models.norm import LayerNorm


class Jais2(Llama):
    name = "jais2"
    mlp_names = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    gated = False

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(norm=LayerNorm)

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.layer_norm_eps


FAMILY = Jais2()
