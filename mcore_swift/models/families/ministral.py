"""Ministral 8B: Mistral's layers, some of them with a sliding window (https://mistral.ai/news/ministraux)."""

from dataclasses import replace

from mcore_swift.models.families.mistral import Mistral
from mcore_swift.models.families.qwen2 import sliding_window
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class Ministral(Mistral):
    name = "ministral"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), window=sliding_window(hf, number))


FAMILY = Ministral()
