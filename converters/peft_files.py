"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, as peft loads and saves them.

An adapter's matrices are those of the HF modules, so that nothing is computed on the way: each rank reads its rows
and columns, and one rank writes what the ranks of one model copy give.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters.export import hf_tensors
from converters.pending import disk_errors
from converters.ranks import Ranks
from mcore_swift.errors import UserError
from mcore_swift.models.rules import RuleTable, Same, as_slices
from mcore_swift.models.shards import ADAPTER, LiveShard
from mcore_swift.tuners.settings import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    shards: Sequence[LiveShard],
    settings: LoraSettings,
    base_model: str,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter that all ranks hold together. Collective.

    Raises UserError on every rank if the disk refuses.
    """
    ranks = ranks or Ranks()
    names: dict[str, None] = {}
    for keys in ranks.gather(list(dict.fromkeys(shard.key for shard in shards))):
        names.update(dict.fromkeys(keys))
    table = RuleTable(Same(key, (peft_name(key),)) for key in names)
    own = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for bucket in hf_tensors(shards, table, dtype=dtype, ranks=ranks)
        for name, tensor in bucket.tensors.items()
    }
    collected = ranks.collect(own)
    error: Exception | None = None
    if ranks.is_first:
        tensors = {name: tensor for part in collected for name, tensor in part.items()}
        try:
            with disk_errors(folder):
                save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
                config = adapter_config(settings, tensors, base_model)
                (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        except Exception as raised:
            error = raised
    ranks.agree(error)


def peft_name(key: str) -> str:
    return PEFT_PREFIX + key.removeprefix(ADAPTER)


def adapter_config(settings: LoraSettings, names: Iterable[str], base_model: str) -> dict[str, Any]:
    """What peft needs to build the adapter again. target_modules: the modules that really have one."""
    modules = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in names})
    ends = sorted({module.rpartition(".")[2] for module in modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": ends if not settings.target_regex else modules,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "modules_to_save": None,
    }


def read_settings(folder: Path) -> LoraSettings:
    """The adapter's settings. Raises UserError for a kind of adapter, or an option of one, that is not supported."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", "give a folder that peft or this program saved"
        ) from None
    refused = [
        f"{name} {config[name]!r}" for name, fine in _FIXED.items() if config.get(name, fine[0]) not in fine
    ]
    if refused:
        raise UserError(f"{path} asks for what is not supported: {', '.join(refused)}")
    targets = config["target_modules"]
    return LoraSettings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        target_modules=tuple(targets) if isinstance(targets, list) else (targets,),
        target_regex=None if isinstance(targets, list) or targets == "all-linear" else targets,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
}


def read_adapter(folder: Path, shards: Iterable[LiveShard], names: Iterable[str]) -> None:
    """Fill this rank's adapter shards from a PEFT folder. Not collective.

    names: keys of all adapter tensors of the model, this rank's and others', to find what the model does not take.
    Raises UserError for a matrix of another shape, one that is missing, and one that no layer takes.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            stored = set(file.keys())
            wanted = {peft_name(key) for key in names}
            _refuse(path, sorted(wanted - stored), "lacks")
            _refuse(
                path, sorted(stored - wanted), "holds, for layers this model or its settings do not adapt,"
            )
            for shard in shards:
                slices = file.get_slice(peft_name(shard.key))
                if tuple(slices.get_shape()) != shard.global_shape:
                    raise UserError(
                        f"{path}: {peft_name(shard.key)} is {slices.get_shape()}, and the model takes "
                        f"{list(shard.global_shape)}",
                        "it is an adapter of another base model, or of another rank",
                    )
                shard.data.copy_(slices[as_slices(shard.region)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "copy the file again") from None


def _refuse(path: Path, names: Sequence[str], verb: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{path}: {verb} {shown}", "it is an adapter of another base model")
