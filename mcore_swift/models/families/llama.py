"""Llama 2, 3 and 3.1+: pre-norm decoder with RMSNorm, rotary embedding, grouped queries and a gated MLP.

arXiv:2302.13971 (Llama), arXiv:2307.09288 (grouped queries), arXiv:2407.21783 (Llama 3, rotary scaling).
"""

from typing import Any

from torch.nn import functional

from mcore_swift.models.family import Family, HFConfig
from mcore_swift.models.rules import QKV, Rule, Same, Stacked, Vocab


class Llama(Family):
    name = "llama"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return {
            "num_layers": hf.num_hidden_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": hf.intermediate_size,
            "num_attention_heads": hf.num_attention_heads,
            "num_query_groups": query_groups(hf),
            "kv_channels": head_dim(hf),
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf.rms_norm_eps,
            "init_method_std": hf.initializer_range,
            "gated_linear_unit": True,
            "activation_func": functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias(hf),
            "attention_dropout": getattr(hf, "attention_dropout", 0.0),
            "hidden_dropout": 0.0,
        }

    def model(self, hf: HFConfig) -> dict[str, Any]:
        return {
            "vocab_size": hf.vocab_size,
            "max_sequence_length": hf.max_position_embeddings,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": tied(hf),
        }

    def qkv_bias(self, hf: HFConfig) -> bool:
        return False

    def unsupported(self, hf: HFConfig) -> list[str]:
        """What this checkpoint's config asks for and megatron-core's layers, as set up here, do not do."""
        wrong = []
        if getattr(hf, "hidden_act", "silu") != "silu":
            wrong.append(f"hidden_act {hf.hidden_act!r} (only 'silu')")
        if getattr(hf, "mlp_bias", False):
            wrong.append("mlp_bias true")
        if getattr(hf, "attention_bias", False):
            wrong.append("attention_bias true (a bias on the attention output)")
        return wrong

    def layer_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        attention = f"{mcore_layer}.self_attention"
        heads = {
            "num_query_groups": query_groups(hf),
            "heads_per_group": hf.num_attention_heads // query_groups(hf),
            "head_dim": head_dim(hf),
        }

        def qkv(kind: str) -> Rule:
            names = tuple(f"{hf_layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            return QKV(f"{attention}.linear_qkv.{kind}", names, **heads)

        return [
            Same(f"{attention}.linear_qkv.layer_norm_weight", (f"{hf_layer}.input_layernorm.weight",)),
            *[qkv(kind) for kind in (("weight", "bias") if self.qkv_bias(hf) else ("weight",))],
            Same(f"{attention}.linear_proj.weight", (f"{hf_layer}.self_attn.o_proj.weight",)),
            *self.mlp_rules(hf, mcore_layer, hf_layer),
        ]

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        """The part of `layer_rules` after attention, with the norm before it."""
        mlp = f"{mcore_layer}.mlp"
        return [
            Same(f"{mlp}.linear_fc1.layer_norm_weight", (f"{hf_layer}.post_attention_layernorm.weight",)),
            Stacked(
                f"{mlp}.linear_fc1.weight",
                (f"{hf_layer}.mlp.gate_proj.weight", f"{hf_layer}.mlp.up_proj.weight"),
            ),
            Same(f"{mlp}.linear_fc2.weight", (f"{hf_layer}.mlp.down_proj.weight",)),
        ]

    def outer_rules(self, hf: HFConfig) -> list[Rule]:
        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), hf.vocab_size),
            Same("decoder.final_layernorm.weight", ("model.norm.weight",)),
        ]
        if not tied(hf):
            rules.append(Vocab("output_layer.weight", ("lm_head.weight",), hf.vocab_size))
        return rules

    def optional_hf(self, hf: HFConfig) -> list[str]:
        buffers = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(hf.num_hidden_layers)]
        return buffers + (["lm_head.weight"] if tied(hf) else [])


def query_groups(hf: HFConfig) -> int:
    return getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads


def head_dim(hf: HFConfig) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def tied(hf: HFConfig) -> bool:
    return bool(getattr(hf, "tie_word_embeddings", False))


FAMILY = Llama()
