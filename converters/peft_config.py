"""adapter_config.json: what peft reads of an adapter, from our settings and to them."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mcore_swift.errors import UserError
from mcore_swift.models.shards import ADAPTER
from mcore_swift.plan.adapter import CONFIG, PREFIX, PeftFolder
from mcore_swift.tuners.settings import LoraSettings

_ROUTERS = ("gate", "router")
_EXPERT = re.compile(r"\.experts\.\d+\.")
DOWN = ("down_proj", "w2")
"""Ends of the names of experts' matrices that stand alone; the others are joined in pairs."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "layer_replication": (None,),
    # other starts take a part out of the frozen weights, and the adapter fits what is left
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Options of peft's that would change what the matrices mean, with the values we know."""

_ALONE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False,),
}
"""Options by which more belongs to an adapter than its matrices, with the values by which nothing does."""


def refuse_other_kinds(config: Mapping[str, Any], path: Path, *, alone: bool = True) -> None:
    """Raise UserError for a kind of adapter, or an option of one, that is not supported on megatron-core's layers.

    alone: nothing but matrices A and B is understood; else what trains whole beside them is too.
    """
    known = _FIXED | _ALONE if alone else _FIXED
    refused = [
        f"{name} {config[name]!r}" for name, fine in known.items() if config.get(name, fine[0]) not in fine
    ]
    if refused:
        raise UserError(
            f"{path} asks for what is not supported on megatron-core's layers: {', '.join(refused)}",
            "train it with `swift sft --backend fsdp`, or merge it with `swift export --merge_lora true`",
        )


def settings_of(adapter: PeftFolder) -> LoraSettings:
    """The settings of an adapter whose matrices are one a module; its targets are the modules that have them.

    Without weights (a checkpoint that only describes its adapter) the targets are those the config names.
    Raises UserError for a kind of adapter, or an option of one, that is not supported.
    """
    config = adapter.config
    refuse_other_kinds(config, adapter.folder / CONFIG, alone=False)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    held = {**adapter.modules, **adapter.embeddings}
    modules = list(held)
    targets = config.get("target_modules") or []
    beside = [name.removesuffix(".weight") for name in config.get("target_parameters") or []]
    named = [*targets, *beside] if isinstance(targets, list) else [targets]
    is_regex = isinstance(targets, str) and targets != "all-linear"
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
        use_dora=config.get("use_dora", False),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        bias=config.get("bias", "none"),
        ensure_weight_tying=bool(config.get("ensure_weight_tying", False)),
        target_modules=tuple(modules or named),
        target_regex=targets if is_regex and not modules else None,
        rank_pattern={name: own for name in modules if (own := held[name]["A"][0]) != rank},
        alpha_pattern={name: told for name in modules if (told := adapter.alpha_of(name)) != alpha},
    )


def config_of(
    settings: LoraSettings, modules: Collection[str], linear: Iterable[str], base_model: str
) -> dict[str, Any]:
    """What peft needs to build the adapter again.

    modules: HF modules that have one. linear: all of the model that could.
    """
    modules = set(modules)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(modules, linear),
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "modules_to_save": list(settings.modules_to_save) or None,
    }
    if settings.ensure_weight_tying:
        config["ensure_weight_tying"] = True
    if any(_end(module) in _ROUTERS for module in modules):
        config["lora_dropout"] = 0.0  # peft has none where it adapts a parameter, as a router's weight is
    experts = {module for module in modules if _EXPERT.search(module)}
    return config | _beside_experts(settings, experts, modules - experts) if experts else config


def _targets(modules: set[str], linear: Iterable[str]) -> list[str]:
    """Ends of names where they mean just these modules, else whole names."""
    left_out = {_end(name) for name in linear if name not in modules}
    return sorted({name if _end(name) in left_out else _end(name) for name in modules})


def _beside_experts(settings: LoraSettings, experts: set[str], others: set[str]) -> dict[str, Any]:
    """What peft (0.19 and later) needs where transformers (5 and later) has all experts of a layer in one tensor.

    peft then takes every target that is named like an expert's matrix for the experts', so that layers of these names
    that are no experts (dense layers, shared experts) have to be told as parameters. It has no dropout there. It joins
    gate and up to one matrix of twice the rank, and with twice the alpha; rsLoRA divides by the root of the rank.
    """
    ends = {_end(name) for name in experts}
    changes: dict[str, Any] = {"lora_dropout": 0.0}
    if alike := sorted(name for name in others if _end(name) in ends):
        changes["target_parameters"] = [f"{name}.weight" for name in alike]
    ranks, alphas = _joined_patterns(settings, experts)
    changes["rank_pattern"] = ranks | dict(settings.rank_pattern)
    changes["alpha_pattern"] = alphas | dict(settings.alpha_pattern)
    return changes


def _joined_patterns(settings: LoraSettings, experts: set[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas, by peft's names of the joined tensors, where they are not the usual ones."""
    members: dict[tuple[str, int], set[str]] = {}
    for module in experts:
        layer = module.partition(".experts.")[0].rpartition(".")[0]
        members.setdefault((layer, 1 if _end(module) in DOWN else 2), set()).add(module)
    ranks, alphas = {}, {}
    for (layer, parts), modules in sorted(members.items()):
        rank = {settings.rank_of(module) for module in modules}
        alpha = {settings.alpha_pattern.get(module, settings.alpha) for module in modules}
        if len(rank) != 1 or len(alpha) != 1:
            continue  # peft cannot join them
        name = f"{layer}.mlp.experts.{'down_proj' if parts == 1 else 'gate_up_proj'}"
        if rank != {settings.rank}:
            ranks[name] = parts * rank.pop()
        counted = alpha.pop() * (math.sqrt(parts) if settings.use_rslora else parts)
        if counted != parts * settings.alpha:
            alphas[name] = counted
    return ranks, alphas


def unloadable(modules: Iterable[str], *, dora: bool = False) -> str | None:
    """Why peft could not load an adapter on these modules beside transformers 5; None if nothing is in the way."""
    experts = [module for module in modules if _EXPERT.search(module)]
    if experts and dora:
        return (
            "experts have magnitudes (DoRA), which peft has not where transformers keeps all of a layer in one tensor: "
            "it will not load this adapter (merged weights are not concerned)"
        )
    ends = {_end(module) for module in experts}.difference(DOWN)
    if len(ends) != 1:
        return None
    return (
        f"experts have an adapter on {ends.pop()} and not on the matrix it is joined with in transformers: peft takes "
        "both or none, and will not load this adapter (merged weights are not concerned)"
    )


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def module_of(name: str) -> str:
    """HF module of a tensor in adapter_model.safetensors, or of an adapter's key."""
    return name.removeprefix(PREFIX).removeprefix(ADAPTER).rpartition(".lora_")[0]
