"""Gemma: scaled embeddings, norm weights stored around 0, GELU in the MLP (arXiv:2403.08295)."""

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig
from mcore_swift.models.layer import OuterTraits
from mcore_swift.models.norm import ZeroCentredRMSNorm


class Gemma(Llama):
    name = "gemma"

    def outer(self, hf: HFConfig) -> OuterTraits:
        return OuterTraits(
            norm=ZeroCentredRMSNorm,
            embedding_scale=hf.hidden_size**0.5,
            logit_softcap=getattr(hf, "final_logit_softcapping", None),
        )

    def activation_name(self, hf: HFConfig) -> str:
        return getattr(hf, "hidden_activation", None) or hf.hidden_act

    def unsupported(self, hf: HFConfig) -> list[str]:
        both_ways = getattr(hf, "use_bidirectional_attention", False)
        return super().unsupported(hf) + (["use_bidirectional_attention true"] if both_ways else [])


FAMILY = Gemma()
