"""Command R7B and Command A: Cohere's layers, three out of four with a sliding window and rotary embedding, the fourth
with neither (arXiv:2504.00698).
"""

from dataclasses import replace

from mcore_swift.models.families.cohere import Cohere
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Cohere2(Cohere):
    name = "cohere2"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        window = sliding_window(hf, number)
        return replace(super().layer(hf, number), window=window, rotary=None if window is None else 0)


FAMILY = Cohere2()
