"""A model as its config.json tells it. Needs no megatron-core, so converting files does not wait for its import."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from mcore_swift.errors import UserError
from mcore_swift.models.family import Family, HFConfig, family_of
from mcore_swift.models.rules import RuleTable


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
    family.rotary(hf)
    return ModelPlan(hf, family, family.rules(hf).as_held(_tensor_names(Path(model_dir))))


def _tensor_names(folder: Path) -> list[str]:
    """Names of the weights in a checkpoint folder; none if it holds a config only, or files no reader understands.

    Which form the weights have is all this is for: whether they are complete and sound is for their reader to say.
    Of weights in MXFP4, whose names end in `_blocks`, the plain names, by which they are read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        if single.exists():
            with single.open("rb") as file:  # 8 bytes say how long the JSON header is
                names = list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        else:
            names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return [name.removesuffix("_blocks") for name in names]
