"""VaultGemma: Gemma 2 without the norms after attention and MLP (arXiv:2510.15001)."""

from dataclasses import replace

from mcore_swift.models.families.gemma2 import Gemma2
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits


class VaultGemma(Gemma2):
    name = "vaultgemma"
    norms = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm",
        "mlp.linear_fc1.layer_norm_": "pre_feedforward_layernorm",
    }

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), norms="pre")


FAMILY = VaultGemma()
