"""The sizes of a model, read from the config.json of a Hugging Face checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, Self

from ..errors import UserError, raise_together
from ..models.catalog import SUPPORTED_ARCHITECTURES

# What transformers takes where a config.json does not name the key; from its configuration classes.
_DEFAULT_GROUPS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder with gated MLPs, RMS norms and rotary positions.

    num_query_groups: key/value heads; ffn_hidden_size: width inside the MLP; tied: input and output
    embedding are one tensor; qkv_bias, output_bias, mlp_bias: which linear layers have a bias;
    qk_norm: queries and keys of each head are normalised; max_position_embeddings: longest sequence
    the checkpoint was trained for; rope_type: 'default', 'llama3', 'yarn' ...
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

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read the dict that config.json holds, as transformers 4 or 5 wrote it.

        source: path for messages. Raises UserError for an architecture that is not supported, and for every
        size that is missing or no positive integer (together).
        """
        family = family_of(config, source)
        raise_together(_bad_sizes(config, source))
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim", _DEFAULT_HEAD_DIM.get(family)) or config["hidden_size"] // heads
        attention_bias = family != "mistral" and bool(config.get("attention_bias", False))
        theta, rope_type = _rope(config)
        return cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_heads=heads,
            # null means "as many as heads"; a key that is not there means the family's default
            num_query_groups=config.get("num_key_value_heads", _DEFAULT_GROUPS.get(family)) or heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,  # qwen2 always has it, whatever the config says
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            max_position_embeddings=config.get("max_position_embeddings") or _DEFAULT_POSITIONS[family],
            rope_theta=theta,
            rope_type=rope_type,
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_query_groups * self.head_dim

    @property
    def matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: linear layers and the output embedding, no biases.

        The input embedding is a look-up and does not count; the output embedding does, tied or not.
        """
        return self.num_layers * self._layer_matmuls() + self.vocab_size * self.hidden_size

    def _layer_matmuls(self) -> int:
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size


def parameters(shape: ModelShape) -> int:
    """Number of parameters, as transformers counts them (a tied embedding once, no padding)."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    biases = (
        shape.qkv_bias * (shape.query_size + 2 * shape.kv_size)
        + shape.output_bias * shape.hidden_size
        + shape.mlp_bias * (2 * shape.ffn_hidden_size + shape.hidden_size)
    )
    norms = 2 * shape.hidden_size + shape.qk_norm * 2 * shape.head_dim
    return embeddings + shape.num_layers * (shape._layer_matmuls() + biases + norms) + shape.hidden_size


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding in memory: the next multiple of `divisible_by` that `tp` ranks share evenly.

    megatron-core multiplies the two; the least common multiple is enough for both and pads less.
    """
    multiple = lcm(max(1, divisible_by), tp)
    return -(-vocab_size // multiple) * multiple


def family_of(config: Mapping[str, Any], source: str = "config.json") -> str:
    """Our family for the architecture that a config.json names. Raises UserError for an unknown one."""
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in SUPPORTED_ARCHITECTURES:
            return SUPPORTED_ARCHITECTURES[architecture]
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    if not named:
        raise UserError(
            f"{source}: names no architecture (key 'architectures')", f"add the one that it is: {supported}"
        )
    raise UserError(
        f"{source}: architecture {', '.join(map(str, named))} is not supported", f"supported are {supported}"
    )


def _bad_sizes(config: Mapping[str, Any], source: str) -> list[UserError]:
    problems = []
    for key in _REQUIRED:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "is missing" if key not in config else f"is {value!r}, not a positive integer"
            problems.append(UserError(f"{source}: {key} {what}", "copy config.json of the checkpoint again"))
    return problems


def _rope(config: Mapping[str, Any]) -> tuple[float, str]:
    """(theta, type): transformers 5 keeps both in rope_parameters, 4 in rope_theta and rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta), rope.get("rope_type") or rope.get("type") or "default"
