"""What one decoder layer is made of, where layers of a model differ from each other or from the plain kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTraits:
    """A family says this of each of its layers; the layer specs are assembled from it.

    The plain kind: norms before attention and MLP, every token sees all before it, a dense MLP.

    window: tokens that a token attends to, itself included; None: all before it.
    softcap: attention scores s become softcap * tanh(s / softcap).
    sinks: each head has a learnt logit that takes part in its softmax and carries no value; the parameter is
    `self_attention.core_attention.softmax_offset`, `[heads]`.
    moe: a router and experts in place of the dense MLP; what they are like is in the family's `config`.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    moe: bool = False


PLAIN = LayerTraits()
