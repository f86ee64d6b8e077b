"""Which HF modules get an adapter."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from mcore_swift.errors import UserError
from mcore_swift.models.rules import Experts, Rule, RuleTable
from mcore_swift.tuners.settings import LoraSettings

ALL_LINEAR, ALL_ROUTER, ALL_EMBEDDING = "all-linear", "all-router", "all-embedding"
ROUTER, EMBEDDING, OUTPUT = "mlp.router.weight", "embedding.word_embeddings.weight", "output_layer.weight"
"""Keys of megatron-core's state dict, or their ends."""


def choose(
    modules: Iterable[str],
    targets: Sequence[str],
    regex: str | None = None,
    kinds: Mapping[str, Iterable[str]] | None = None,
) -> set[str]:
    """The modules that the targets match, by peft's rules, as full HF names ('model.layers.0.self_attn.q_proj').

    A target is the name of one of the `kinds` ('all-linear', a layer of megatron-core's), or the end of a module's
    name. With `regex`, it must match the whole name, and targets are not looked at. Raises UserError for a target
    that matches nothing.
    """
    modules = list(modules)
    kinds = {ALL_LINEAR: modules} | dict(kinds or {})
    if regex is not None:
        return _by_regex(modules, regex, kinds)
    chosen: set[str] = set()
    for target in targets:
        if target in kinds:
            if not (members := set(kinds[target])):
                raise UserError(f"--target_modules {target}: this model has none", f"drop {target}")
            chosen |= members
            continue
        matched = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not matched:
            raise _nothing_matches(f"--target_modules {target}", target, modules, kinds)
        chosen |= matched
    return chosen


def chosen_modules(table: RuleTable, settings: LoraSettings) -> set[str]:
    """HF modules of the whole model that get an adapter. Raises UserError for a target that matches nothing.

    As in peft, modules trained in full get none.
    """
    output = tied_output(table)
    if output and not settings.target_regex and output.removesuffix(".weight") in settings.target_modules:
        raise UserError(
            f"--target_modules {output.removesuffix('.weight')}: the output layer of this model is its embedding",
            f"train it whole: --modules_to_save {embedding_module(table).rpartition('.')[2]}",
        )
    kinds = (
        fused_layers(table)
        | fused_experts(table)
        | {
            ALL_LINEAR: linear_modules(table),
            ALL_ROUTER: router_modules(table),
            ALL_EMBEDDING: _module_names(table, EMBEDDING),
        }
    )
    chosen = choose(adaptable_modules(table), settings.target_modules, settings.target_regex, kinds)
    _refuse_vocabulary(table, chosen, settings)
    adapted = {name for name in chosen if not is_in(name, settings.modules_to_save)}
    if not adapted:
        raise UserError(
            f"--modules_to_save {' '.join(settings.modules_to_save)}: it covers every module that would get an adapter",
            "drop it, or use --tuner_type full with --freeze_parameters",
        )
    return adapted


def adaptable_modules(table: RuleTable) -> list[str]:
    """HF names of all modules that support an adapter: linear layers, routers, embedding and output layer."""
    outer = [name for key in (EMBEDDING, OUTPUT) for name in _module_names(table, key)]
    return [*linear_modules(table), *router_modules(table), *outer]


def router_modules(table: RuleTable) -> list[str]:
    """HF names of the routers."""
    return [
        name
        for rule in table.rules
        if rule.mcore.endswith(ROUTER)
        for name in _module_names(table, rule.mcore)
    ]


def tied_output(table: RuleTable) -> str | None:
    """HF name of the output layer's weight if it is tied to the embedding, else None."""
    if "output_layer.weight" in table.by_mcore:
        return None
    outer = (name for name in sorted(table.optional_hf) if ".layers." not in name)
    return next((name for name in outer if name.endswith(".weight")), "lm_head.weight")


def embedding_module(table: RuleTable) -> str:
    """HF name of the embedding."""
    return _module_names(table, EMBEDDING)[0]


def _module_names(table: RuleTable, key: str) -> list[str]:
    return [table.by_mcore[key].hf[0].removesuffix(".weight")] if key in table.by_mcore else []


def _refuse_vocabulary(table: RuleTable, chosen: Collection[str], settings: LoraSettings) -> None:
    """Raise UserError for an adapter that embedding, output layer or router do not support."""
    embedding = embedding_module(table)
    if embedding in chosen and OUTPUT not in table.by_mcore:
        raise UserError(
            f"an adapter on {embedding}: the output layer is tied to it, and would not have the adapter",
            f"train it in full: --modules_to_save {embedding.rpartition('.')[2]}",
        )
    if embedding in chosen and any(key.startswith("mtp.") for key in table.by_mcore):
        raise UserError(
            f"an adapter on {embedding}: multi-token layers use the embedding too, on another pipeline stage",
            f"train it in full: --modules_to_save {embedding.rpartition('.')[2]}, or add --mtp_num_layers 0",
        )
    others = [name for name in (embedding, *router_modules(table)) if name in chosen]
    if settings.use_dora and others:
        raise UserError(
            f"--use_dora: {others[0]} does not support magnitudes, only linear layers do",
            "leave it out of --target_modules, or drop --use_dora",
        )


def is_in(module: str, ends: Collection[str]) -> bool:
    """Whether the name of a module, or of a module around it, has one of these ends: peft's rule of modules_to_save."""
    parts = module.split(".")
    return any(".".join(parts[:depth]).endswith(tuple(ends)) for depth in range(1, len(parts) + 1))


def _by_regex(modules: Sequence[str], regex: str, kinds: Iterable[str]) -> set[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"--target_regex {regex}: is no regular expression ({error})") from None
    chosen = {name for name in modules if pattern.fullmatch(name)}
    if not chosen:
        words = re.findall(r"\w+", regex)
        raise _nothing_matches(f"--target_regex {regex}", words[-1] if words else regex, modules, kinds)
    return chosen


def _nothing_matches(flag: str, target: str, modules: Sequence[str], kinds: Iterable[str]) -> UserError:
    ends = sorted({name.rpartition(".")[2] for name in modules} | {kind for kind in kinds if "." not in kind})
    near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or ends
    return UserError(
        f"{flag} matches no module of this model that supports adapters", f"nearest names: {', '.join(near)}"
    )


def fused_layers(table: RuleTable) -> dict[str, list[str]]:
    """megatron-core's name of a linear layer, such as 'linear_qkv' -> the HF modules that such layers are made of."""
    layers: dict[str, list[str]] = {}
    for rule in table.matrices.rules:
        if _is_linear(rule.mcore):
            layers.setdefault(rule.mcore.split(".")[-2], []).extend(_linear_names(rule))
    return layers


def fused_experts(table: RuleTable) -> dict[str, list[str]]:
    """transformers' name of a tensor of all experts of a layer -> the HF modules of the single experts in it."""
    rules = [rule for rule in table.matrices.rules if isinstance(rule, Experts) and rule.fused]
    return {rule.fused: _linear_names(rule) for rule in rules}


def linear_modules(table: RuleTable) -> list[str]:
    """HF names of the linear layers that support adapters: all column- and row-parallel ones.

    As in peft's 'all-linear', the output layer is not included.
    """
    return [name for names in fused_layers(table).values() for name in names]


def _linear_names(rule: Rule) -> list[str]:
    """HF modules whose weights a linear layer is made of; none of several matrices in one tensor."""
    return [name.removesuffix(".weight") for name in rule.hf if name.endswith(".weight")]


def _is_linear(key: str) -> bool:
    *_, layer, kind = key.split(".")
    return kind == "weight" and layer.startswith("linear_")
