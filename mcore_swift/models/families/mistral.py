"""Mistral dense: Llama's layers; the first release attends within a sliding window (arXiv:2310.06825)."""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class Mistral(Llama):
    name = "mistral"

    def config(self, hf: HFConfig) -> dict:
        window = getattr(hf, "sliding_window", None)
        # HF counts the token itself, megatron-core how far a token may look back and forward.
        return super().config(hf) | ({"window_size": (window - 1, 0)} if window else {})


FAMILY = Mistral()
