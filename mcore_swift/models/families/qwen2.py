"""Qwen2 and Qwen2.5 dense: Llama's layers with a bias on query, key and value (arXiv:2407.10671).

With use_sliding_window, the layers from max_window_layers on have a sliding window.
"""

from dataclasses import replace

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Qwen2(Llama):
    name = "qwen2"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), window=sliding_window(hf, number))

    def qkv_bias(self, hf: HFConfig) -> bool:
        return True

    def output_bias(self, hf: HFConfig) -> bool:
        return False


def sliding_window(hf: HFConfig, number: int) -> int | None:
    """The window (tokens) of layer `number`, from a config whose layer_types say which layers have one; else None."""
    types = getattr(hf, "layer_types", None)
    slides = types is not None and types[number] == "sliding_attention"
    return getattr(hf, "sliding_window", None) if slides else None


FAMILY = Qwen2()
