"""Reads a model's config.json. Needs no megatron-core, so converting files does not wait for its import."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_swift.errors import UserError
from mcore_swift.models.family import Family, HFConfig, family_of
from mcore_swift.models.rules import RuleTable
from mcore_swift.plan.weights import multi_token_names, tensor_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """A model before it is built: its HF config, its family, and how its weights are named.

    Reading it is cheap and needs no process group.
    """

    hf: HFConfig
    family: Family
    table: RuleTable

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return any(self.family.layer(self.hf, number).moe for number in range(self.hf.num_hidden_layers))

    @property
    def multi_token_layers(self) -> int:
        """Layers after the decoder that predict tokens further ahead."""
        return self.family.multi_token_layers(self.hf)


def read_model(model_dir: str, multi_token_layers: int | None = None) -> ModelPlan:
    """Read `<model_dir>/config.json`.

    multi_token_layers: how many the user asks for: 0, or the checkpoint's number; None: those in the checkpoint.
    Raises UserError for an unsupported architecture or option, and for multi-token layers that are not there.
    """
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(model_dir)
    family = family_of(hf)
    refused = family.unsupported(hf)
    if refused:
        raise UserError(f"{model_dir}/config.json asks for what is not supported: {'; '.join(refused)}")
    family.rotary(hf)
    names = tensor_names(Path(model_dir))
    further = multi_token_names(names, hf.num_hidden_layers, family.multi_token_layers(hf))
    without = _without_multi_token_layers(
        model_dir, hf, family, not names or bool(further), multi_token_layers
    )
    table = family.rules(hf, without).as_held(names)
    if without:
        table.optional_hf |= further
    return ModelPlan(hf, family, table)


def _without_multi_token_layers(
    model_dir: str, hf: HFConfig, family: Family, held: bool, wanted: int | None
) -> dict[str, Any]:
    """Leave the multi-token layers out of `hf` if they are not wanted or not `held`.

    Returns the fields that an exported config.json then has to change; empty if they stay. Raises UserError if
    the user wants a number of layers other than 0 that the checkpoint does not have.
    """
    told = family.multi_token_layers(hf)
    if wanted not in (None, 0, told):
        raise UserError(
            f"--mtp_num_layers {wanted}: {model_dir}/config.json tells of {told} multi-token layers",
            remedy=f"use --mtp_num_layers {told}, or 0 to leave them out",
        )
    if not told or (held and wanted != 0):
        return {}
    if not held and wanted:
        raise UserError(
            f"--mtp_num_layers {wanted}: {model_dir} holds no weights of multi-token layers",
            remedy="leave --mtp_num_layers out, to train without them",
        )
    if not held:
        logger.warning(
            "%s holds no weights of the %d multi-token layers that its config.json describes: they are left out",
            model_dir,
            told,
            extra={"on_all_ranks": True},
        )
    setattr(hf, family.multi_token_key, 0)
    return {family.multi_token_key: 0}
