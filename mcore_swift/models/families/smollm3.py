"""SmolLM3: Llama's layers, every fourth without rotary embedding (NoPE, arXiv:2501.18795)."""

from dataclasses import replace

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class SmolLM3(Llama):
    name = "smollm3"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(
            super().layer(hf, number),
            rotary=0 if hf.no_rope_layers[number] else None,  # 1 means that there is one
            window=sliding_window(hf, number),
        )


FAMILY = SmolLM3()
