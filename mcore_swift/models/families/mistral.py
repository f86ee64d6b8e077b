"""Mistral dense: Llama's layers; the first release has a sliding window (arXiv:2310.06825)."""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Mistral(Llama):
    name = "mistral"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return LayerTraits(window=getattr(hf, "sliding_window", None))

    def qkv_bias(self, hf: HFConfig) -> bool:
        return False

    def output_bias(self, hf: HFConfig) -> bool:
        return False

    def mlp_bias(self, hf: HFConfig) -> bool:
        return False


FAMILY = Mistral()
