"""ERNIE 4.5 dense: Llama's layers with rotary pairs of adjacent dimensions (https://yiyan.baidu.com/blog)."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class Ernie45(Llama):
    name = "ernie4_5"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"rotary_interleaved": True}

    def qkv_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias

    def output_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias

    def mlp_bias(self, hf: HFConfig) -> bool:
        return hf.use_bias


FAMILY = Ernie45()
