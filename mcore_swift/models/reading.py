"""A model as its config.json tells it. Needs no megatron-core, so converting files does not wait for its import."""

from dataclasses import dataclass

from mcore_swift.errors import UserError
from mcore_swift.models.family import Family, HFConfig, family_of
from mcore_swift.models.frequencies import inverse_frequencies
from mcore_swift.models.rules import RuleTable


@dataclass(frozen=True)
class ModelPlan:
    """A model before it is built: its HF config, its family, and how its weights are named.

    Reading it is cheap and needs no process group.
    """

    hf: HFConfig
    family: Family
    table: RuleTable


def read_model(model_dir: str) -> ModelPlan:
    """Read `<model_dir>/config.json`.

    Raises UserError for an architecture, or an option of one, that is not supported.
    """
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(model_dir)
    family = family_of(hf)
    refused = family.unsupported(hf)
    if refused:
        raise UserError(f"{model_dir}/config.json asks for what is not supported: {'; '.join(refused)}")
    inverse_frequencies(hf)
    return ModelPlan(hf, family, family.rules(hf))
