"""What one decoder layer is made of, where layers of a model differ from each other or from the plain kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTraits:
    """A family says this of each of its layers; the layer specs are assembled from it.

    The plain kind: norms before attention and MLP, every token sees all before it, a dense MLP.

    window: tokens that a token attends to, itself included; None: all before it.
    """

    window: int | None = None


PLAIN = LayerTraits()
