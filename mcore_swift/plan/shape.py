"""The sizes of a model, read from the config.json of a Hugging Face checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, Self

from ..errors import UserError, raise_together
from ..models.catalog import SUPPORTED_ARCHITECTURES
from .architectures import ARCHITECTURES, Architecture

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with MLPs or experts, norms and rotary positions.

    num_query_groups: key/value heads; ffn_hidden_size: width inside the dense MLP; tied: input and output
    embedding are one tensor; qkv_bias, output_bias, mlp_bias: which linear layers have a bias;
    qk_norm: queries and keys of each head are normalised (qk_norm_full: with a weight for every head);
    gated: the MLP has a gate beside its first matrix; norm_bias: norms of hidden size have a bias;
    max_position_embeddings: longest sequence the checkpoint was trained for; rope_type: 'default', 'llama3' ...
    norms_per_layer: norms of hidden size. sinks: a learnt attention sink for each head.
    sliding_layers: for each layer, whether its attention is limited to `sliding_window` tokens; empty: none is.

    Experts: num_experts routed ones (0: a dense model), each moe_ffn_hidden_size wide; a token is sent to
    num_experts_per_token of them. shared_ffn_hidden_size: width of all shared experts together (0: none), behind
    a gate of their own with shared_expert_gate; moe_layers: for each layer, whether its MLP has experts;
    expert_bias: router and experts have biases. num_mtp_layers: multi-token-prediction layers.

    Latent attention (kv_lora_rank not None; arXiv:2405.04434, section 2.1): q_lora_rank None means that queries are
    projected directly; head_dim = qk_nope_head_dim + qk_rope_head_dim; v_head_dim: width of a value head.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_type: str = "default"
    qk_norm_full: bool = False
    gated: bool = True
    norm_bias: bool = False
    norms_per_layer: int = 2
    sinks: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    shared_expert_gate: bool = False
    moe_layers: tuple[bool, ...] = ()
    expert_bias: bool = False
    num_mtp_layers: int = 0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int | None = None

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read the contents of a config.json written by transformers 4 or 5.

        source: its path, for messages. Raises UserError for an unknown architecture, or one that names every size
        that is missing or not a positive integer.
        """
        facts = architecture_of(config, source)
        given = {**_defaults(facts, config), **config}
        raise_together(_bad_sizes(given, facts, source))
        theta, rope_type = _rope(config)
        return cls(
            family=facts.family,
            num_layers=given["num_hidden_layers"],
            hidden_size=given["hidden_size"],
            ffn_hidden_size=given["intermediate_size"],
            vocab_size=given["vocab_size"],
            tied=bool(given.get("tie_word_embeddings", False)),
            qkv_bias=_switch(facts.qkv_bias, given),
            output_bias=_switch(facts.output_bias, given),
            mlp_bias=_switch(facts.mlp_bias, given),
            qk_norm=_switch(facts.qk_norm, given),
            qk_norm_full=facts.qk_norm_full and _switch(facts.qk_norm, given),
            gated=facts.gated,
            norm_bias=facts.norm_bias,
            norms_per_layer=facts.norms_per_layer - bool(given.get(facts.one_less_if)),
            sinks=facts.sinks,
            max_position_embeddings=given["max_position_embeddings"] or 2048,
            rope_theta=theta,
            rope_type=rope_type,
            **_heads(given, facts),
            **_windows(given, facts),
            **_experts(given, facts),
        )

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_experts > 0 and any(self.moe_layers)

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (and, except in latent attention, of all value heads)."""
        return self.num_query_groups * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one value head, and of one head of the attention's output."""
        return self.v_head_dim or self.head_dim

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a plain MLP instead of experts."""
        return not self.is_moe or not all(self.moe_layers)

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts. Indices beyond the last layer are MTP layers, built like it."""
        return self.is_moe and self.moe_layers[min(index, self.num_layers - 1)]

    def window(self, index: int) -> int | None:
        """Number of tokens that attention of layer `index` is limited to; None: no limit."""
        sliding = bool(self.sliding_layers) and self.sliding_layers[min(index, self.num_layers - 1)]
        return self.sliding_window if sliding else None


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding in memory: the next common multiple of `divisible_by` and `tp`.

    megatron-core rounds to a multiple of their product; the least common multiple suffices and pads less.
    """
    multiple = lcm(max(1, divisible_by), tp)
    return -(-vocab_size // multiple) * multiple


def architecture_of(config: Mapping[str, Any], source: str = "config.json") -> Architecture:
    """What is known of the architecture that a config.json names. Raises UserError for an unknown one."""
    return ARCHITECTURES[_named(config, ARCHITECTURES, source)]


def family_of(config: Mapping[str, Any], source: str = "config.json") -> str:
    """Our model family for the architecture that a config.json names. Raises UserError if there is none."""
    return SUPPORTED_ARCHITECTURES[_named(config, SUPPORTED_ARCHITECTURES, source)]


def _named(config: Mapping[str, Any], known: Mapping[str, Any], source: str) -> str:
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in known:
            return architecture
    supported = ", ".join(known)
    if not named:
        raise UserError(
            f"{source}: names no architecture (key 'architectures')", f"add the one that it is: {supported}"
        )
    raise UserError(
        f"{source}: architecture {', '.join(map(str, named))} is not supported", f"supported are {supported}"
    )


def _switch(fact: bool | str, given: Mapping[str, Any]) -> bool:
    return bool(given.get(fact, False)) if isinstance(fact, str) else fact


def _bad_sizes(given: Mapping[str, Any], facts: Architecture, source: str) -> list[UserError]:
    required = [*_REQUIRED]
    if facts.experts in ("qwen", "deepseek"):
        required += ["moe_intermediate_size"]
    if facts.experts != "none":
        required += ["num_experts_per_tok"]
    problems = []
    for key in required:
        value = given.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "is missing" if key not in given else f"is {value!r}, not a positive integer"
            problems.append(UserError(f"{source}: {key} {what}", "copy config.json of the checkpoint again"))
    return problems


def _heads(given: Mapping[str, Any], facts: Architecture) -> dict[str, Any]:
    heads = given["num_attention_heads"]
    if facts.mla:
        nope, rope = given["qk_nope_head_dim"], given["qk_rope_head_dim"]
        return {
            "num_heads": heads,
            "num_query_groups": heads,  # keys and values are computed for every head
            "head_dim": nope + rope,
            "kv_lora_rank": given["kv_lora_rank"],
            "q_lora_rank": given["q_lora_rank"],
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": given["v_head_dim"],
        }
    return {
        "num_heads": heads,
        # null means "as many as heads"; a missing key means the family's default
        "num_query_groups": given.get("num_key_value_heads") or heads,
        "head_dim": given.get("head_dim") or given["hidden_size"] // heads,
    }


def _windows(given: Mapping[str, Any], facts: Architecture) -> dict[str, Any]:
    window, layers = given.get("sliding_window"), given["num_hidden_layers"]
    if not window or facts.windows == "none":
        return {}
    sliding = [True] * layers
    if facts.windows == "types":
        every = given.get("sliding_window_pattern") or facts.full_every
        if every:
            sliding = [(index + 1) % every != 0 for index in range(layers)]
        types = given.get("layer_types")
        if types and len(types) == layers:
            sliding = [kind == "sliding_attention" for kind in types]
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def _defaults(facts: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's defaults; not that of the number of experts if `config` gives one, under whichever name."""
    if any(name in config for name in _EXPERT_COUNTS):
        return {key: value for key, value in facts.defaults.items() if key not in _EXPERT_COUNTS}
    return dict(facts.defaults)


def _experts(given: Mapping[str, Any], facts: Architecture) -> dict[str, Any]:
    count = next((given[name] for name in _EXPERT_COUNTS if given.get(name)), 0)
    if facts.experts == "none" or not count:
        return {}
    layers = range(given["num_hidden_layers"])
    found: dict[str, Any] = {
        "num_experts": count,
        "num_experts_per_token": given["num_experts_per_tok"],
        "moe_ffn_hidden_size": given.get("moe_intermediate_size") or given["intermediate_size"],
        "expert_bias": facts.expert_bias,
        "moe_layers": tuple(True for _ in layers),
    }
    if facts.experts == "mixtral":
        found["moe_ffn_hidden_size"] = given["intermediate_size"]
    if facts.experts == "qwen":
        step, dense = given.get("decoder_sparse_step") or 1, given.get("mlp_only_layers") or []
        found["moe_layers"] = tuple((index + 1) % step == 0 and index not in dense for index in layers)
        found["shared_ffn_hidden_size"] = given.get("shared_expert_intermediate_size") or 0
        found["shared_expert_gate"] = bool(found["shared_ffn_hidden_size"])
    if facts.experts == "deepseek":
        first, step = given.get("first_k_dense_replace") or 0, given.get("moe_layer_freq") or 1
        found["moe_layers"] = tuple(index >= first and index % step == 0 for index in layers)
        found["shared_ffn_hidden_size"] = (given.get("n_shared_experts") or 0) * found["moe_ffn_hidden_size"]
        found["num_mtp_layers"] = given.get("num_nextn_predict_layers") or given.get("num_mtp_layers") or 0
    return found


def _rope(config: Mapping[str, Any]) -> tuple[float, str]:
    """(theta, type): transformers 5 keeps both in rope_parameters, 4 in rope_theta and rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta), rope.get("rope_type") or rope.get("type") or "default"
