"""EXAONE 4: norms after attention and MLP and on query and key heads; in models where some layers have a sliding
window, the others have no rotary embedding (arXiv:2507.11407).
"""

from dataclasses import replace
from typing import Any

from mcore_swift.models.families.olmo2 import Olmo2
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Exaone4(Olmo2):
    name = "exaone4"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"qk_layernorm": True}

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        window = sliding_window(hf, number)
        turned = hf.sliding_window is None or window is not None
        return replace(super().layer(hf, number), window=window, rotary=0 if turned else None, qk_norm=None)

    def qkv_bias(self, hf: HFConfig) -> bool:
        return False

    def output_bias(self, hf: HFConfig) -> bool:
        return False


FAMILY = Exaone4()
