"""Weights trained in full beside adapters: modules_to_save and biases, by peft's rules and under its names."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from mcore_swift.errors import UserError
from mcore_swift.models.rules import InFloat32, Rule, RuleTable, Vocab
from mcore_swift.models.shards import ADAPTER, LiveShard, parameter_shards, unwrap
from mcore_swift.plan.adapter import PREFIX
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import chosen_modules, is_in, tied_output


@dataclass(frozen=True)
class Beside:
    """files: HF names of weights trained in full -> their names in adapter_model.safetensors.

    copies: further names under which peft looks for one of them (a tied weight) -> the first name.
    buffers: names in the file of the modules' buffers, which do not train.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()


def beside(table: RuleTable, settings: LoraSettings) -> Beside:
    """The weights trained in full. Depends only on the names of the whole model, so it is the same on every rank.

    Raises UserError for a module that the model does not have, for experts, and for an embedding that should train
    independently of the output layer it is tied to.
    """
    if not settings.modules_to_save and settings.bias == "none":
        return Beside()
    weights = {name: rule for rule in table.rules for name in _own_names(rule)}
    _refuse_unknown(settings.modules_to_save, weights, table)
    saved = {name: rule for name, rule in weights.items() if _module_is_in(name, settings.modules_to_save)}
    _refuse_experts(saved)
    adapted = chosen_modules(table, settings)
    buffers = frozenset(PREFIX + name for name, rule in saved.items() if isinstance(rule, InFloat32))
    files = {name: PREFIX + name for name in saved if PREFIX + name not in buffers}
    for name in _biases(weights, settings.bias, adapted):
        module, _, last = name.rpartition(".")
        files.setdefault(name, f"{PREFIX}{module}.base_layer.{last}" if module in adapted else PREFIX + name)
    return Beside(files, _tied_copies(table, files, settings), buffers)


def settled(table: RuleTable, settings: LoraSettings) -> LoraSettings:
    """The settings, completed by what depends on the model: whether a trained embedding stays tied."""
    copies = beside(table, settings).copies
    return replace(settings, ensure_weight_tying=bool(copies))


def whole_shards(chunks: Iterable[nn.Module]) -> list[LiveShard]:
    """This rank's shards of the weights trained in full."""
    return [
        shard
        for chunk in chunks
        for parameter, shard in parameter_shards(unwrap(chunk))
        if parameter.requires_grad and not shard.key.startswith(ADAPTER)
    ]


def _own_names(rule: Rule) -> Sequence[str]:
    return rule.hf[:1] if isinstance(rule, Vocab) else rule.hf  # the others are copies


def _module_is_in(weight: str, ends: Collection[str]) -> bool:
    return is_in(weight.rpartition(".")[0], ends)


def _biases(weights: Mapping[str, Rule], kind: str, adapted: Collection[str]) -> list[str]:
    if kind == "none":
        return []
    biases = [name for name in weights if "bias" in name.rpartition(".")[2]]
    if kind == "lora_only":
        biases = [name for name in biases if name.rpartition(".")[0] in adapted]
    biases = [name for name in biases if not isinstance(weights[name], InFloat32)]
    if not biases:
        where = "the layers with adapters have" if kind == "lora_only" else "this model has"
        raise UserError(f"--lora_bias {kind}: {where} no biases", "drop --lora_bias")
    return biases


def _tied_copies(table: RuleTable, files: Mapping[str, str], settings: LoraSettings) -> dict[str, str]:
    embedding = _own_names(table.by_mcore["embedding.word_embeddings.weight"])[0]
    output = tied_output(table)
    if output is None or embedding not in files:
        return {}
    if settings.ensure_weight_tying is False:
        raise UserError(
            f"the adapter trains {embedding} independently of the output layer, and this model ties the two",
            "train it with ensure_weight_tying, or use `swift sft --backend fsdp`",
        )
    return {PREFIX + output: files[embedding]}


def _refuse_unknown(targets: Sequence[str], weights: Collection[str], table: RuleTable) -> None:
    for target in targets:
        if any(_module_is_in(name, (target,)) for name in weights):
            continue
        output = tied_output(table)
        if output and output.removesuffix(".weight").endswith(target):
            embedding = table.by_mcore["embedding.word_embeddings.weight"].hf[0].split(".")[-2]
            raise UserError(
                f"--modules_to_save {target}: the output layer of this model is its embedding",
                f"use --modules_to_save {embedding}, which trains both",
            )
        ends = sorted({part for name in weights for part in name.split(".")[:-1] if not part.isdigit()})
        near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or ends
        raise UserError(
            f"--modules_to_save {target}: this model has no such module", f"nearest names: {', '.join(near)}"
        )


def _refuse_experts(saved: Iterable[str]) -> None:
    experts = [name for name in saved if ".experts." in name]
    if experts:
        raise UserError(
            f"--modules_to_save: {experts[0]} belongs to an expert, which peft cannot save in full",
            "train adapters on the experts, or use --tuner_type full with --freeze_parameters",
        )
