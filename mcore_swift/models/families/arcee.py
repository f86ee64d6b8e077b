"""Arcee AFM: Llama's layers with an ungated squared-ReLU MLP (https://www.arcee.ai/blog/deep-dive-afm-4-5b)."""

from mcore_swift.models.families.llama import Llama


class Arcee(Llama):
    name = "arcee"
    mlp_names = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    gated = False


FAMILY = Arcee()
