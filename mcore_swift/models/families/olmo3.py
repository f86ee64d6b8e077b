"""OLMo 3: OLMo 2 with a sliding window in three out of four layers, rotary scaling in the rest (arXiv:2512.13961)."""

from dataclasses import replace

from mcore_swift.models.families.gemma3 import LAYER_TYPES
from mcore_swift.models.families.olmo2 import Olmo2
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.frequencies import Frequencies
from mcore_swift.models.layer import LayerTraits


class Olmo3(Olmo2):
    name = "olmo3"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(
            super().layer(hf, number),
            window=sliding_window(hf, number),
            rotary=LAYER_TYPES.index(hf.layer_types[number]),
        )

    def rotary(self, hf: HFConfig) -> list[Frequencies]:
        return [Frequencies(hf, layer_type) for layer_type in LAYER_TYPES]


FAMILY = Olmo3()
