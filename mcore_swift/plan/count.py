"""Parameter counts of a model, by how the layout divides them. Exact: see tests/unit/test_plan_parameters.py."""

from dataclasses import dataclass

from .shape import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Parameters of one or more layers, by what divides them.

    split: divided by tensor parallelism. whole: copied on every tensor-parallel rank (norms, routers, biases of
    row-parallel layers, down projections of latent attention). experts: of all routed experts, divided by expert and
    expert tensor parallelism.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(self.split + other.split, self.whole + other.whole, self.experts + other.experts)

    def __mul__(self, times: int) -> "Sizes":
        return Sizes(self.split * times, self.whole * times, self.experts * times)

    @property
    def total(self) -> int:
        return self.split + self.whole + self.experts


def attention_sizes(shape: ModelShape) -> Sizes:
    """Parameters of one layer's attention, with the norms inside it."""
    h, out = shape.hidden_size, shape.num_heads * shape.value_dim
    whole = shape.output_bias * h
    if shape.is_mla:
        split, latent = _latent_sizes(shape)
        whole += latent
    else:
        qkv = shape.query_size + 2 * shape.kv_size
        split = qkv * (h + shape.qkv_bias)
        if shape.qk_norm_full:
            split += shape.query_size + shape.kv_size
        elif shape.qk_norm:
            whole += 2 * shape.head_dim
    return Sizes(split=split + out * h + shape.sinks * shape.num_heads, whole=whole)


def _latent_sizes(shape: ModelShape) -> tuple[int, int]:
    """(split, whole) parameters of latent attention's projections to queries, keys and values."""
    h, rank = shape.hidden_size, shape.kv_lora_rank or 0
    down = h * (rank + shape.qk_rope_head_dim) + rank  # with the norm of the latent
    bias = shape.qkv_bias * (rank + shape.qk_rope_head_dim)
    up = rank * shape.num_heads * (shape.qk_nope_head_dim + shape.value_dim)
    if shape.q_lora_rank is None:
        return up + h * shape.query_size, down + bias
    bias += shape.qkv_bias * shape.q_lora_rank
    return up + shape.q_lora_rank * shape.query_size, down + bias + shape.q_lora_rank * (h + 1)


def expert_parameters(shape: ModelShape) -> int:
    """Parameters of one routed expert."""
    h, width = shape.hidden_size, shape.moe_ffn_hidden_size
    return 3 * h * width + shape.expert_bias * (2 * width + h)


def mlp_sizes(shape: ModelShape, index: int) -> Sizes:
    """Parameters of the MLP of layer `index`, or of its router, experts and shared experts."""
    h = shape.hidden_size
    if not shape.is_moe_layer(index):
        width = shape.ffn_hidden_size
        first = (1 + shape.gated) * width
        return Sizes(split=(first + width) * h + shape.mlp_bias * first, whole=shape.mlp_bias * h)
    router = shape.num_experts * (h + shape.expert_bias)
    return Sizes(
        split=3 * h * shape.shared_ffn_hidden_size,
        whole=router + shape.shared_expert_gate * h,
        experts=shape.num_experts * expert_parameters(shape),
    )


def norm_parameters(shape: ModelShape) -> int:
    """Parameters of one norm of hidden size."""
    return (1 + shape.norm_bias) * shape.hidden_size


def layer_sizes(shape: ModelShape, index: int) -> Sizes:
    """All parameters of layer `index` (from 0)."""
    norms = Sizes(whole=shape.norms_per_layer * norm_parameters(shape))
    return attention_sizes(shape) + mlp_sizes(shape, index) + norms


def mtp_sizes(shape: ModelShape) -> Sizes:
    """One multi-token-prediction layer: a decoder layer, the projection of the concatenated embedding and hidden
    state, and three norms (arXiv:2412.19437, section 2.2). The embeddings are shared with the model."""
    h = shape.hidden_size
    return layer_sizes(shape, shape.num_layers) + Sizes(split=2 * h * h, whole=3 * h)


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of one embedding, the input's or the output's."""
    return shape.vocab_size * shape.hidden_size


def parameters(shape: ModelShape) -> int:
    """Number of parameters as transformers counts them: a tied embedding once, no padding, no MTP layers."""
    layers = sum(layer_sizes(shape, index).total for index in range(shape.num_layers))
    return embedding_parameters(shape) * (1 if shape.tied else 2) + layers + norm_parameters(shape)


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token uses: all except the routed experts it is not sent to."""
    idle = shape.num_experts - shape.num_experts_per_token
    return parameters(shape) - sum(shape.moe_layers) * idle * expert_parameters(shape)


def matmul_parameters(shape: ModelShape) -> int:
    """Number of weights that each token is multiplied by: linear layers and the output embedding, no biases.

    The input embedding is a look-up and does not count; the output embedding does, tied or not. Only the routed
    experts that a token is sent to count. Without MTP layers.
    """
    layers = sum(layer_matmuls(shape, index) for index in range(shape.num_layers))
    return layers + shape.vocab_size * shape.hidden_size


def layer_matmuls(shape: ModelShape, index: int) -> int:
    """Weights of layer `index` that each token is multiplied by: no biases, no norms, active experts only."""
    h = shape.hidden_size
    if shape.is_mla:
        split, whole = _latent_sizes(shape)
        norms = shape.kv_lora_rank + (shape.q_lora_rank or 0)
        biases = norms + shape.qk_rope_head_dim if shape.qkv_bias else 0
        attention = split + whole - norms - biases
    else:
        attention = h * (shape.query_size + 2 * shape.kv_size)
    attention += h * shape.num_heads * shape.value_dim
    if not shape.is_moe_layer(index):
        return attention + (2 + shape.gated) * h * shape.ffn_hidden_size
    widths = shape.num_experts_per_token * shape.moe_ffn_hidden_size + shape.shared_ffn_hidden_size
    return attention + 3 * h * widths + (shape.num_experts + shape.shared_expert_gate) * h


def mtp_matmuls(shape: ModelShape) -> int:
    """Weights that a token is multiplied by in one multi-token-prediction layer, with the output embedding."""
    h = shape.hidden_size
    return layer_matmuls(shape, shape.num_layers) + 2 * h * h + embedding_parameters(shape)
