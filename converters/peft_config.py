"""adapter_config.json: peft's settings of an adapter, converted from and to `LoraSettings`."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_swift.config.base import found_from_anywhere
from mcore_swift.errors import raise_together
from mcore_swift.models.rules import RuleTable
from mcore_swift.models.shards import ADAPTER
from mcore_swift.plan.adapter import CONFIG, PREFIX, PeftFolder, option_problems, read_config
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import chosen_modules

_ROUTERS = ("gate", "router")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_UNLISTED = (".mlp.shared_expert.down_proj", ".mlp.router")
"""Ends of names of modules that qwen2_moe and gpt_oss alone have: see `_renamed`."""
DOWN = ("down_proj", "w2")
"""Names of the expert matrix that transformers does not fuse; the other two are fused as a pair."""


def settings_of(adapter: PeftFolder) -> LoraSettings:
    """The settings of an adapter with one A and one B per module; its targets are the modules that have them.

    Without weights (see `settings_of_checkpoint`) the targets are those the config names, of the usual rank and alpha.
    Raises UserError for a kind of adapter, or an option of one, that is not supported.
    """
    config = adapter.config
    raise_together(option_problems(config, adapter.folder / CONFIG))
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


def settings_of_checkpoint(folder: Path, table: RuleTable) -> LoraSettings:
    """The settings of the adapter that a checkpoint of a run on megatron-core describes, for a model of this table.

    Raises UserError for a config that is broken, and for targets that the model lacks.
    """
    described = PeftFolder(folder, read_config(folder))
    settings = settings_of(described)
    modules = chosen_modules(table, settings)
    return replace(
        settings,
        rank_pattern={name: own for name in modules if (own := described.rank_of(name)) != settings.rank},
        alpha_pattern={name: own for name in modules if (own := described.alpha_of(name)) != settings.alpha},
    )


def config_of(
    settings: LoraSettings, modules: Collection[str], linear: Iterable[str], base_model: str
) -> dict[str, Any]:
    """The adapter_config.json with which peft builds the same adapter.

    modules: HF modules with an adapter. linear: all modules of the model that support one.
    """
    modules, linear = set(modules), list(linear)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found_from_anywhere(base_model) if base_model else base_model,
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
        config["lora_dropout"] = (
            0.0  # peft supports no dropout for adapters on parameters, such as a router's weight
        )
    experts = {module for module in modules if _EXPERT.search(module)}
    if any(name.endswith(_UNLISTED) for name in linear):
        return config | _renamed(settings, modules, experts, linear)
    return config | _beside_experts(settings, experts, modules - experts) if experts else config


def _targets(modules: set[str], linear: Iterable[str]) -> list[str]:
    """Ends of module names where they match only these modules, else full names."""
    left_out = {_end(name) for name in linear if name not in modules}
    return sorted({name if _end(name) in left_out else _end(name) for name in modules})


def _beside_experts(settings: LoraSettings, experts: set[str], others: set[str]) -> dict[str, Any]:
    """Settings for experts, which transformers (5 and later) stores in one tensor per layer, for peft 0.19 and later.

    peft treats every target named like an expert matrix as the experts', so other layers of these names (dense layers,
    shared experts) have to be listed as parameters. It supports no dropout there. It fuses gate and up into one matrix
    with twice the rank and twice the alpha, while rsLoRA divides by the square root of the rank.
    """
    ends = {_end(name) for name in experts}
    changes: dict[str, Any] = {"lora_dropout": 0.0}
    if alike := sorted(name for name in others if _end(name) in ends):
        changes["target_parameters"] = [f"{name}.weight" for name in alike]
    ranks, alphas = _joined_patterns(settings, _fused(experts))
    changes["rank_pattern"] = ranks | dict(settings.rank_pattern)
    changes["alpha_pattern"] = alphas | dict(settings.alpha_pattern)
    return changes


def _renamed(
    settings: LoraSettings, modules: set[str], experts: set[str], linear: Iterable[str]
) -> dict[str, Any]:
    """Settings for families whose settings peft (0.21) does not rewrite for transformers 5, as it does for others:
    qwen2_moe, whose experts' weights it fuses all the same, and gpt_oss, on whose experts there is no adapter here.
    """
    routers = {module for module in modules if _end(module) in _ROUTERS}
    plain = modules - experts - routers
    fused = _fused(experts)
    ranks, alphas = _joined_patterns(settings, fused, rewritten=False)
    changes = {
        "target_modules": _targets(plain, [name for name in linear if not _EXPERT.search(name)]),
        "target_parameters": [*(f"{name}.weight" for name in sorted(routers)), *fused],
        "rank_pattern": ranks | dict(settings.rank_pattern),
        "alpha_pattern": alphas | dict(settings.alpha_pattern),
    }
    return changes | ({"lora_dropout": 0.0} if experts else {})


def _fused(experts: Iterable[str]) -> dict[str, set[str]]:
    """Name in transformers of each fused tensor -> the modules of single experts with an adapter in it."""
    members: dict[str, set[str]] = {}
    for module in experts:
        layer = module.partition(".experts.")[0].rpartition(".")[0]
        fused = "down_proj" if _end(module) in DOWN else "gate_up_proj"
        members.setdefault(f"{layer}.mlp.experts.{fused}", set()).add(module)
    return dict(sorted(members.items()))


def _joined_patterns(
    settings: LoraSettings, fused: Mapping[str, set[str]], *, rewritten: bool = True
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and alphas of fused matrices that differ from the default, by peft's names of their tensors.

    rewritten: peft's default for gate and up is twice the rank and alpha of the config.
    """
    ranks, alphas = {}, {}
    for name, modules in fused.items():
        rank = {settings.rank_of(module) for module in modules}
        alpha = {settings.alpha_pattern.get(module, settings.alpha) for module in modules}
        if len(rank) != 1 or len(alpha) != 1:
            continue  # peft cannot fuse them
        parts = 1 if name.endswith(".down_proj") else 2
        usual = parts if rewritten else 1
        if (of_all := parts * rank.pop()) != usual * settings.rank:
            ranks[name] = of_all
        counted = alpha.pop() * (math.sqrt(parts) if settings.use_rslora else parts)
        if counted != usual * settings.alpha:
            alphas[name] = counted
    return ranks, alphas


def unloadable(modules: Iterable[str], *, dora: bool = False) -> str | None:
    """Why peft cannot load an adapter on these modules with transformers 5; None if it can."""
    experts = [module for module in modules if _EXPERT.search(module)]
    if experts and dora:
        return (
            "experts have magnitudes (DoRA), which peft does not support where transformers stores all experts of a "
            "layer in one tensor: peft will not load this adapter (merged weights are not affected)"
        )
    ends = {_end(module) for module in experts}.difference(DOWN)
    if len(ends) != 1:
        return None
    return (
        f"experts have an adapter on {ends.pop()} but not on the matrix that transformers fuses it with: peft needs "
        "both or none, and will not load this adapter (merged weights are not affected)"
    )


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def module_of(name: str) -> str:
    """HF module of a tensor in adapter_model.safetensors, or of an adapter's key."""
    return name.removeprefix(PREFIX).removeprefix(ADAPTER).rpartition(".lora_")[0]
