"""HyperCLOVA X SEED: Granite's multipliers, and norms on both sides of attention and MLP (arXiv:2506.22403)."""

from dataclasses import replace

from mcore_swift.models.families.granite import Granite
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import LayerTraits, OuterTraits
from mcore_swift.models.rules import Rule

POST_NORMS = {"post_self_attn_layernorm.": "post_norm1", "post_mlp_layernorm.": "post_norm2"}


class HyperClovaX(Granite):
    name = "hyperclovax"

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return replace(super().layer(hf, number), norms="sandwich" if hf.use_post_norm else "pre")

    def outer(self, hf: HFConfig) -> OuterTraits:
        return replace(super().outer(hf), logit_scale=hf.logits_scaling)

    def norm_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        behind = POST_NORMS if hf.use_post_norm else {}
        return super().norm_rules(hf, mcore_layer, hf_layer) + [
            rule
            for mcore, name in behind.items()
            for rule in self.one_norm(hf, f"{mcore_layer}.{mcore}", f"{hf_layer}.{name}")
        ]


FAMILY = HyperClovaX()
