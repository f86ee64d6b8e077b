"""Qwen2 and Qwen2.5 dense: Llama's layers with a bias on query, key and value (arXiv:2407.10671)."""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class Qwen2(Llama):
    name = "qwen2"

    def qkv_bias(self, hf: HFConfig) -> bool:
        return True

    def unsupported(self, hf: HFConfig) -> list[str]:
        windows = ["use_sliding_window true"] if getattr(hf, "use_sliding_window", False) else []
        return super().unsupported(hf) + windows


FAMILY = Qwen2()
