"""GLM-4-9B in transformers' format: rotary embedding on half of each head, in pairs of adjacent dimensions; biases on
query, key and value; gate and up in one tensor (arXiv:2406.12793).
"""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class Glm(Llama):
    name = "glm"
    mlp_names = {"up": "mlp.gate_up_proj", "down": "mlp.down_proj"}

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"rotary_interleaved": True}

    def output_bias(self, hf: HFConfig) -> bool:
        return False


FAMILY = Glm()
