"""Llama 2, 3 and 3.1+: pre-norm decoder with RMSNorm, rotary embedding, grouped queries and a gated MLP.

arXiv:2302.13971 (Llama), arXiv:2307.09288 (grouped queries), arXiv:2407.21783 (Llama 3, rotary scaling).

Most other dense families override a few things and inherit the rest from this one.
"""

from typing import Any, ClassVar

from mcore_swift.models.activations import activation
from mcore_swift.models.family import Family, HFConfig
from mcore_swift.models.layer import LayerTraits
from mcore_swift.models.rules import QKV, FusedQKV, Norm, Rule, Same, Stacked, Vocab

BEFORE_MLP = "mlp.linear_fc1.layer_norm_"
"""Prefix of the megatron-core names of the norm before a dense MLP."""


class Llama(Family):
    name = "llama"

    norms: ClassVar[dict[str, str]] = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm",
        BEFORE_MLP: "post_attention_layernorm",
    }
    """Prefix of a norm's megatron-core names -> the norm's name in a Hugging Face layer."""

    attention_names: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "output": "self_attn.o_proj",
    }
    """Hugging Face names of linear layers; 'qkv' in place of q, k and v if they are one tensor."""

    mlp_names: ClassVar[dict[str, str]] = {
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    """Without 'gate' if the MLP has none, or if 'up' is gate and up in one tensor."""

    outer_names: ClassVar[dict[str, str]] = {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
    }
    gated: ClassVar[bool] = True

    def config(self, hf: HFConfig) -> dict[str, Any]:
        norm = self.outer(hf).norm
        return {
            "num_layers": hf.num_hidden_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size(hf),
            "num_attention_heads": hf.num_attention_heads,
            "num_query_groups": query_groups(hf),
            "kv_channels": head_dim(hf),
            "normalization": norm.normalization,
            "layernorm_zero_centered_gamma": norm.initial == 0.0,
            "layernorm_epsilon": self.norm_epsilon(hf),
            "init_method_std": hf.initializer_range,
            "gated_linear_unit": self.gated,
            "activation_func": activation(self.activation_name(hf)),
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

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        return LayerTraits(output_bias=self.output_bias(hf), mlp_bias=self.mlp_bias(hf))

    def norm_epsilon(self, hf: HFConfig) -> float:
        return hf.rms_norm_eps

    def ffn_hidden_size(self, hf: HFConfig) -> int:
        return hf.intermediate_size

    def activation_name(self, hf: HFConfig) -> str:
        return getattr(hf, "hidden_act", "silu")

    def qkv_bias(self, hf: HFConfig) -> bool:
        return bool(getattr(hf, "attention_bias", False))

    def output_bias(self, hf: HFConfig) -> bool:
        return bool(getattr(hf, "attention_bias", False))

    def mlp_bias(self, hf: HFConfig) -> bool:
        return bool(getattr(hf, "mlp_bias", False))

    def layer_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        return [
            *self.norm_rules(hf, mcore_layer, hf_layer),
            *self.attention_rules(hf, f"{mcore_layer}.self_attention", hf_layer),
            *self.mlp_rules(hf, mcore_layer, hf_layer),
        ]

    def norm_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        """Rules of the norms over the hidden dimension, except the one before the MLP."""
        return [
            rule
            for mcore, name in self.norms.items()
            if mcore != BEFORE_MLP
            for rule in self.one_norm(hf, f"{mcore_layer}.{mcore}", f"{hf_layer}.{name}")
        ]

    def one_norm(self, hf: HFConfig, mcore: str, name: str) -> list[Rule]:
        """Rules of a norm, given the prefix of its megatron-core names and its Hugging Face name."""
        norm = self.outer(hf).norm
        rules: list[Rule] = [Norm(f"{mcore}weight", (f"{name}.weight",), initial=norm.initial)]
        if norm.has_bias:
            rules.append(Same(f"{mcore}bias", (f"{name}.bias",)))
        return rules

    def attention_rules(self, hf: HFConfig, attention: str, hf_layer: str) -> list[Rule]:
        """Rules of the attention projections. attention: their prefix in megatron-core."""
        output = f"{hf_layer}.{self.attention_names['output']}"
        rules = [self.qkv_rule(hf, attention, hf_layer, "weight")]
        if self.qkv_bias(hf):
            rules.append(self.qkv_rule(hf, attention, hf_layer, "bias"))
        rules.append(Same(f"{attention}.linear_proj.weight", (f"{output}.weight",)))
        if self.output_bias(hf):
            rules.append(Same(f"{attention}.linear_proj.bias", (f"{output}.bias",)))
        return rules

    def qkv_rule(self, hf: HFConfig, attention: str, hf_layer: str, kind: str) -> Rule:
        """The rule of the query, key and value projections. kind: 'weight' or 'bias'."""
        mcore, names = f"{attention}.linear_qkv.{kind}", self.attention_names
        heads = {
            "num_query_groups": query_groups(hf),
            "heads_per_group": hf.num_attention_heads // query_groups(hf),
            "head_dim": head_dim(hf),
        }
        if "qkv" in names:
            return FusedQKV(mcore, (f"{hf_layer}.{names['qkv']}.{kind}",), **heads)
        return QKV(mcore, tuple(f"{hf_layer}.{names[part]}.{kind}" for part in "qkv"), **heads)

    def mlp_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        """Rules of the MLP and the norm before it."""
        mlp, norm = f"{mcore_layer}.mlp", self.norms.get(BEFORE_MLP)
        kinds = ("weight", "bias") if self.mlp_bias(hf) else ("weight",)
        first = tuple(
            f"{hf_layer}.{self.mlp_names[part]}" for part in ("gate", "up") if part in self.mlp_names
        )
        kind_of_rule = Stacked if len(first) == 2 else Same
        return [
            *(self.one_norm(hf, f"{mcore_layer}.{BEFORE_MLP}", f"{hf_layer}.{norm}") if norm else []),
            *[
                kind_of_rule(f"{mlp}.linear_fc1.{kind}", tuple(f"{name}.{kind}" for name in first))
                for kind in kinds
            ],
            *[
                Same(f"{mlp}.linear_fc2.{kind}", (f"{hf_layer}.{self.mlp_names['down']}.{kind}",))
                for kind in kinds
            ],
        ]

    def outer_rules(self, hf: HFConfig) -> list[Rule]:
        names = self.outer_names
        rules: list[Rule] = [
            Vocab("embedding.word_embeddings.weight", (f"{names['embedding']}.weight",), hf.vocab_size),
            *self.one_norm(hf, "decoder.final_layernorm.", names["norm"]),
        ]
        if not tied(hf):
            rules.append(Vocab("output_layer.weight", (f"{names['output']}.weight",), hf.vocab_size))
        return rules

    def optional_hf(self, hf: HFConfig) -> list[str]:
        buffers = [f"{self.hf_layers}.{n}.self_attn.rotary_emb.inv_freq" for n in range(hf.num_hidden_layers)]
        return buffers + ([f"{self.outer_names['output']}.weight"] if tied(hf) else [])


def query_groups(hf: HFConfig) -> int:
    """Number of key and value heads; as many as query heads if the config names none."""
    return getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads


def head_dim(hf: HFConfig) -> int:
    """Width of one head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def tied(hf: HFConfig) -> bool:
    """Whether the output layer shares the embedding's weight."""
    return bool(getattr(hf, "tie_word_embeddings", False))


FAMILY = Llama()
