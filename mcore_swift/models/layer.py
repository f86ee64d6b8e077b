"""How a model's decoder layers, and what surrounds them, differ from the plain kind."""

from dataclasses import dataclass
from typing import Literal

from mcore_swift.models.norm import Norm, RMSNorm


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434) in place of query, key and value projections.

    norm_eps: epsilon of the norms of the latents. interleaved: whether rotary pairs are adjacent dimensions
    (0 and 1, 2 and 3, ...) or half the width apart.
    """

    norm_eps: float = 1e-6
    interleaved: bool = True


@dataclass(frozen=True)
class LayerTraits:
    """A family's description of one layer, from which the layer spec is assembled.

    The plain kind: norms before attention and MLP, causal attention to all earlier tokens, a dense MLP.

    window: tokens that a token attends to, itself included; None: all before it.
    softcap: attention scores s become softcap * tanh(s / softcap).
    sinks: each head has a learnt logit that takes part in its softmax and carries no value; the parameter is
    `self_attention.core_attention.softmax_offset`, `[heads]`.
    moe: a router and experts in place of the dense MLP; the family's `config` has their details.
    rotary: index of the family's rotary embedding that is applied to queries and keys; None: none (NoPE).
    norms: where attention and MLP have their norms: on their input ('pre'), on the output that they add to the
        residual stream ('post'), or on both ('sandwich').
    parallel: attention and MLP read the same input, the MLP through a norm of its own ('two_norms') or through
        attention's ('one_norm'); None: one after the other.
    residual_scale: factor on what attention and MLP add to the residual stream.
    qk_norm: None: as `qk_layernorm` of the config says (one norm that every head shares, or none); 'full': over
        all heads together; 'each': a norm of its own for each head; 'turned': the one that every head shares, after
        the rotary embedding.
    output_bias, mlp_bias: whether the attention's output projection, and both linear layers of the MLP, have a bias.
    latent: keys and values through a latent; None: the usual projections.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    moe: bool = False
    rotary: int | None = 0
    norms: Literal["pre", "post", "sandwich"] = "pre"
    parallel: Literal["one_norm", "two_norms"] | None = None
    residual_scale: float = 1.0
    qk_norm: Literal["full", "each", "turned"] | None = None
    output_bias: bool = False
    mlp_bias: bool = False
    latent: Latent | None = None


PLAIN = LayerTraits()


@dataclass(frozen=True)
class OuterTraits:
    """What surrounds the layers.

    norm: class of every norm over the hidden dimension, one of `mcore_swift.models.norm`.
    embedding_scale: factor on token embeddings. embedding_dropout: dropout probability of embeddings.
    logit_scale: factor on logits.
    logit_softcap: scaled logits are squashed into (-cap, cap) by cap * tanh(logit / cap); None: they are not.
    """

    norm: type[Norm] = RMSNorm
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


PLAIN_OUTER = OuterTraits()
