"""Which HF modules get an adapter."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from mcore_swift.errors import UserError
from mcore_swift.models.rules import RuleTable
from mcore_swift.tuners.settings import LoraSettings

ALL_LINEAR = "all-linear"

# megatron-core's names of fused layers, for the HF modules they are made of
MEGATRON_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj", "gate_up_proj"),
    "linear_fc2": ("down_proj",),
}


def choose(modules: Iterable[str], targets: Sequence[str], regex: str | None = None) -> set[str]:
    """The modules (full HF names, such as 'model.layers.0.self_attn.q_proj') that the targets mean, as peft reads them.

    A target is 'all-linear' (every module given), the end of a module's name, or a megatron-core name. With `regex`,
    it must match the whole name, and targets are not looked at. Raises UserError for a target that matches nothing.
    """
    modules = list(modules)
    if regex is not None:
        return _by_regex(modules, regex)
    if ALL_LINEAR in targets:
        return set(modules)
    chosen: set[str] = set()
    for target in targets:
        ends = MEGATRON_NAMES.get(target, (target,))
        matched = {name for name in modules if any(name == end or name.endswith(f".{end}") for end in ends)}
        if not matched:
            raise _nothing_matches(f"--target_modules {target}", target, modules)
        chosen |= matched
    return chosen


def chosen_modules(table: RuleTable, settings: LoraSettings) -> set[str]:
    """HF modules of the whole model that get an adapter. Raises UserError for a target that matches nothing.

    As in peft, a module that trains whole gets none.
    """
    chosen = choose(linear_modules(table), settings.target_modules, settings.target_regex)
    adapted = {name for name in chosen if not is_in(name, settings.modules_to_save)}
    if not adapted:
        raise UserError(
            f"--modules_to_save {' '.join(settings.modules_to_save)}: all modules with adapters train whole",
            "drop it, or use --tuner_type full with --freeze_parameters",
        )
    return adapted


def is_in(module: str, ends: Collection[str]) -> bool:
    """Whether a module is, or is inside, one whose name ends so: modules_to_save as peft reads it."""
    parts = module.split(".")
    return any(".".join(parts[:depth]).endswith(tuple(ends)) for depth in range(1, len(parts) + 1))


def _by_regex(modules: Sequence[str], regex: str) -> set[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"--target_regex {regex}: is no regular expression ({error})") from None
    chosen = {name for name in modules if pattern.fullmatch(name)}
    if not chosen:
        raise _nothing_matches(f"--target_regex {regex}", regex, modules)
    return chosen


def _nothing_matches(flag: str, target: str, modules: Sequence[str]) -> UserError:
    ends = sorted({name.rpartition(".")[2] for name in modules} | set(MEGATRON_NAMES))
    near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or ends
    return UserError(f"{flag} matches no linear layer of this model", f"nearest names: {', '.join(near)}")


def linear_modules(table: RuleTable) -> list[str]:
    """HF names of the linear layers an adapter can be on: all that are split by output rows or input columns.

    The output layer is none of them, as in peft's 'all-linear'.
    """
    return [
        name.removesuffix(".weight")
        for rule in table.matrices.rules
        if _is_linear(rule.mcore)
        for name in rule.hf
        if name.endswith(".weight")  # else several matrices in one tensor
    ]


def _is_linear(key: str) -> bool:
    *_, layer, kind = key.split(".")
    return kind == "weight" and layer.startswith("linear_")
