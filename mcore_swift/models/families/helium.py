"""Helium: Llama's layers with rotary pairs of adjacent dimensions (https://kyutai.org/2025/04/30/helium.html)."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class Helium(Llama):
    name = "helium"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"rotary_interleaved": True}

    def output_bias(self, hf: HFConfig) -> bool:
        return False


FAMILY = Helium()
