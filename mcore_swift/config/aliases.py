"""Flag names of ms-swift v3 (and a few of the HF Trainer) that are accepted under their current names.

Using one prints a notice with the current name.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .values import BadValue, as_bool


def _inverted(value: Any) -> bool:
    return not as_bool(value)


def _minutes_in_seconds(value: Any) -> int:
    try:
        return round(float("nan" if isinstance(value, bool) else value) * 60)
    except (ValueError, OverflowError):
        raise BadValue(f"takes a number of minutes, not '{value}'") from None


def _flash_attention(value: Any) -> str | None:
    return "flash_attn" if as_bool(value) else None


@dataclasses.dataclass(frozen=True)
class Alias:
    """name: the current flag. convert: from the old value to the new one; None: unchanged. how: describes it."""

    name: str
    convert: Callable[[Any], Any] | None = None
    how: str = ""


_RENAMED = {
    "train_type": "tuner_type",
    "load": "mcore_model",
    "adapter_load": "mcore_adapter",
    "ref_load": "mcore_ref_model",
    "ref_adapter_load": "mcore_ref_adapter",
    "save": "output_dir",
    "save_interval": "save_steps",
    "eval_interval": "eval_steps",
    "log_interval": "logging_steps",
    "distributed_backend": "ddp_backend",
    "manual_gc_interval": "manual_gc_steps",
    "num_workers": "dataloader_num_workers",
    "max_epochs": "num_train_epochs",
    "num_virtual_stages_per_pipeline_rank": "virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage",
    "gradient_checkpointing_kwargs": "vit_gradient_checkpointing_kwargs",
    "custom_register_path": "external_plugins",
}
# v3 flags that switch something off
_SWITCHED_OFF = {
    "no_masked_softmax_fusion": "masked_softmax_fusion",
    "no_bias_dropout_fusion": "bias_dropout_fusion",
    "no_bias_swiglu_fusion": "bias_activation_fusion",
    "no_rope_fusion": "apply_rope_fusion",
    "no_gradient_accumulation_fusion": "gradient_accumulation_fusion",
    "no_initialization": "perform_initialization",
    "no_data_sharding": "data_sharding",
}

ALIASES: Mapping[str, Alias] = (
    {old: Alias(new) for old, new in _RENAMED.items()}
    | {old: Alias(new, _inverted, "inverted") for old, new in _SWITCHED_OFF.items()}
    | {
        "use_flash_attn": Alias("attn_impl", _flash_attention, "as"),
        "sft_type": Alias("tuner_type"),
        "model_id_or_path": Alias("model"),
        "dtype": Alias("torch_dtype"),
    }
    | {"distributed_timeout_minutes": Alias("ddp_timeout", _minutes_in_seconds, "in seconds")}
)

# v3 counts the layers per virtual stage; the number of stages follows from the depth of the model
LAYERS_PER_STAGE = "num_layers_per_virtual_pipeline_stage"


def virtual_stages(layers_per_stage: Any, pipeline_size: Any, model: Any) -> int:
    """Number of virtual stages per pipeline stage, from v3's number of layers per virtual stage.

    model: folder with the config.json that says how many layers there are. Raises BadValue.
    """
    try:
        layers = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        a_round = int(layers_per_stage) * int(pipeline_size)
    except (OSError, KeyError, ValueError, TypeError):
        raise BadValue(
            "needs the number of layers in the config.json of --model, which cannot be read"
        ) from None
    if a_round < 1 or layers % a_round:
        raise BadValue(
            f"{layers_per_stage} times {pipeline_size} stages does not divide the model's {layers} layers"
        )
    return layers // a_round
