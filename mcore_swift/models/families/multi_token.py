"""Multi-token layers under the names of DeepSeek-V3's checkpoint, which other models adopted (arXiv:2412.19437)."""

from dataclasses import replace

from mcore_swift.models.family import Family, HFConfig
from mcore_swift.models.rules import Rule, Same


class MultiToken(Family):
    """A mixin, listed before the family whose layers the multi-token layers consist of."""

    multi_token_key = "num_nextn_predict_layers"

    def unsupported(self, hf: HFConfig) -> list[str]:
        refused = super().unsupported(hf)
        if getattr(hf, "tie_word_embeddings", False) and self.multi_token_layers(hf):
            refused.append(f"tie_word_embeddings true beside {self.multi_token_key} (multi-token layers)")
        return refused

    def outer_rules(self, hf: HFConfig) -> list[Rule]:
        """The checkpoint repeats embedding and output layer in every multi-token layer."""
        embedding, norm, *output = super().outer_rules(hf)
        first = hf.num_hidden_layers
        layers = [f"model.layers.{number}" for number in range(first, first + self.multi_token_layers(hf))]
        embeddings = [f"{layer}.embed_tokens.weight" for layer in layers]
        heads = [f"{layer}.shared_head.head.weight" for layer in layers]
        return [
            replace(embedding, hf=(*embedding.hf, *embeddings)),
            norm,
            *[replace(rule, hf=(*rule.hf, *heads)) for rule in output],
        ]

    def multi_token_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        names = {
            "enorm.weight": "enorm.weight",
            "hnorm.weight": "hnorm.weight",
            "eh_proj.weight": "eh_proj.weight",
            "final_layernorm.weight": "shared_head.norm.weight",
        }
        return [
            *[Same(f"{mcore_layer}.{ours}", (f"{hf_layer}.{theirs}",)) for ours, theirs in names.items()],
            *self.layer_rules(hf, f"{mcore_layer}.transformer_layer", hf_layer),
        ]
