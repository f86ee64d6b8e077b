"""What a model family declares, and the lookup of an architecture's family."""

import importlib
from typing import Any, ClassVar

from mcore_swift.errors import UserError
from mcore_swift.models.catalog import SUPPORTED_ARCHITECTURES
from mcore_swift.models.frequencies import Frequencies
from mcore_swift.models.layer import PLAIN, PLAIN_OUTER, LayerTraits, OuterTraits
from mcore_swift.models.rules import Rule, RuleTable

HFConfig = Any
"""A transformers PretrainedConfig, which has the attributes of the checkpoint's config.json."""


class Family:
    """An architecture: how its HF config translates to megatron-core's, and which weights it has.

    Subclasses override `config`, `model`, `layer_rules` and `outer_rules`; everything that loads, exports or
    checks weights is derived from the rules. Families whose layers differ from the plain kind override `layer`.
    """

    name: ClassVar[str]
    hf_layers: ClassVar[str] = "model.layers"
    """Prefix of the Hugging Face names of decoder layers, up to the layer number."""
    multi_token_key: ClassVar[str | None] = None
    """The key of config.json that holds the number of multi-token layers; None for a family without them."""

    def config(self, hf: HFConfig) -> dict[str, Any]:
        """Keyword arguments for megatron-core's TransformerConfig."""
        raise NotImplementedError

    def model(self, hf: HFConfig) -> dict[str, Any]:
        """Keyword arguments for megatron-core's GPTModel: vocabulary, rotary embedding, tied weights."""
        raise NotImplementedError

    def layer(self, hf: HFConfig, number: int) -> LayerTraits:
        """Traits of decoder layer `number`, counted from 0 over the whole model."""
        return PLAIN

    def outer(self, hf: HFConfig) -> OuterTraits:
        """Traits of what surrounds the layers: the kind of norm, what happens to embeddings and logits."""
        return PLAIN_OUTER

    def rotary(self, hf: HFConfig) -> list[Frequencies]:
        """The rotary embeddings of the model; `LayerTraits.rotary` says which one a layer uses.

        Raises UserError for a kind that is not supported.
        """
        return [Frequencies(hf)]

    def best_of_group(self, hf: HFConfig) -> int | None:
        """With groups of experts: how many of a group's best experts make its score; None: megatron-core's number."""
        return None

    def multi_token_layers(self, hf: HFConfig) -> int:
        """Number of layers after the decoder that predict further tokens; `layer` numbers them after the decoder's."""
        return getattr(hf, self.multi_token_key or "", 0) or 0

    def multi_token_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        """Rules of one multi-token layer, given its name prefixes, such as 'mtp.layers.0' and 'model.layers.61'."""
        raise NotImplementedError

    def layer_rules(self, hf: HFConfig, mcore_layer: str, hf_layer: str) -> list[Rule]:
        """Rules of one decoder layer, given its name prefixes, such as 'decoder.layers.3' and 'model.layers.3'."""
        raise NotImplementedError

    def outer_rules(self, hf: HFConfig) -> list[Rule]:
        """Rules of what lies outside the layers: the embedding first, then final norm and output layer."""
        raise NotImplementedError

    def optional_hf(self, hf: HFConfig) -> list[str]:
        """HF tensors that a checkpoint may hold but that carry no information of their own."""
        return []

    def unsupported(self, hf: HFConfig) -> list[str]:
        """What the config asks for that is not supported, as phrases for an error message; empty if all is."""
        return []

    def rules(self, hf: HFConfig, config: dict[str, Any] | None = None) -> RuleTable:
        """All rules of the model. config: fields that an exported config.json has to change from the one read."""
        layers = [
            rule
            for layer in range(hf.num_hidden_layers)
            for rule in self.layer_rules(hf, f"decoder.layers.{layer}", f"{self.hf_layers}.{layer}")
        ]
        ahead = [
            rule
            for depth in range(self.multi_token_layers(hf))
            for rule in self.multi_token_rules(
                hf, f"mtp.layers.{depth}", f"model.layers.{hf.num_hidden_layers + depth}"
            )
        ]
        embedding, *outer = self.outer_rules(hf)
        return RuleTable([embedding, *layers, *outer, *ahead], self.optional_hf(hf), config)


def family_of(hf: HFConfig) -> Family:
    """The family of a HF config, by the architecture it names.

    Raises UserError for an architecture that is not supported.
    """
    architectures = getattr(hf, "architectures", None) or []
    for architecture in architectures:
        name = SUPPORTED_ARCHITECTURES.get(architecture)
        if name is not None:
            module = importlib.import_module(f"mcore_swift.models.families.{name}")
            return module.FAMILY
    named = ", ".join(architectures) or f"no architecture (model_type {getattr(hf, 'model_type', None)!r})"
    raise UserError(
        f"the checkpoint's config.json names {named}, which is not supported",
        remedy=f"supported architectures: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}",
    )
