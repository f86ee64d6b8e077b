"""Adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, as peft loads and saves them.

An adapter's matrices are those of the HF modules, so that nothing is computed on the way: each rank reads its rows
and columns, and one rank writes what the ranks of one model copy give.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converters.export import hf_tensors
from converters.peft_config import DOWN, config_of, module_of, settings_of
from converters.pending import disk_errors
from converters.ranks import Ranks
from mcore_swift.errors import UserError, raise_together
from mcore_swift.models.rules import Experts, Region, RuleTable, Same, TurnedExperts, as_slices
from mcore_swift.models.shards import ADAPTER, LiveShard
from mcore_swift.plan.adapter import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    PeftFolder,
    matrix_problems,
    option_problems,
    read_peft_folder,
)
from mcore_swift.tuners.beside import Beside, beside
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import adaptable_modules, router_modules


def write_adapter(
    folder: Path,
    shards: Sequence[LiveShard],
    settings: LoraSettings,
    base_model: str,
    table: RuleTable,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter that is distributed over the ranks, and the weights trained in full, as PEFT files. Collective.

    table: of the base model. Raises UserError on every rank if the disk is full or not writable.
    """
    ranks = ranks or Ranks()
    names: dict[str, None] = {}
    for keys in ranks.gather(list(dict.fromkeys(shard.key for shard in shards))):
        names.update(dict.fromkeys(keys))
    whole = beside(table, settings)
    own = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for bucket in hf_tensors(shards, _in_file(names, table, whole), dtype=dtype, ranks=ranks)
        for name, tensor in bucket.tensors.items()
    }
    collected = ranks.collect(own)

    def write() -> None:
        tensors = {name: tensor for part in collected for name, tensor in part.items()}
        tensors |= {copy: tensors[name].clone() for copy, name in whole.copies.items()}
        save_peft(folder, tensors, settings, base_model, adaptable_modules(table))

    ranks.together(write, where=ranks.is_first)


def _in_file(keys: Iterable[str], table: RuleTable, whole: Beside) -> RuleTable:
    """Rules from keys of adapters, and of weights trained in full, to names in adapter_model.safetensors."""
    rules = []
    for key in keys:
        if key.startswith(ADAPTER):
            rules.append(Same(key, (peft_name(key),)))
        else:
            names = (whole.files.get(name) for name in table.by_mcore[key].hf)
            rules.append(replace(table.by_mcore[key], hf=tuple(name for name in names if name)))
    return RuleTable(rules)


def save_peft(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: LoraSettings,
    base_model: str,
    linear: Iterable[str],
) -> None:
    """Write a PEFT folder from whole tensors, by their names in the file."""
    with disk_errors(folder):
        save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    modules = [module_of(name) for name in tensors if ".lora_" in name]
    write_config(folder, settings, modules, linear, base_model)


def write_config(
    folder: Path, settings: LoraSettings, modules: Iterable[str], linear: Iterable[str], base_model: str
) -> None:
    """Write adapter_config.json. modules: HF modules with an adapter; linear: all that support one."""
    config = config_of(settings, set(modules), linear, base_model)
    with disk_errors(folder):
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_name(key: str) -> str:
    """The name in adapter_model.safetensors for the key of an adapter's tensor."""
    return PREFIX + key.removeprefix(ADAPTER)


@dataclass(frozen=True)
class Place:
    """Where a matrix is stored: the tensor in the file, and the rows and columns of it (None: all)."""

    name: str
    rows: slice | None = None
    columns: slice | None = None

    def extent(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the matrix, given the shape of the tensor."""
        parts = (self.rows, self.columns)
        return tuple(
            len(range(*parts[axis].indices(size))) if axis < 2 and parts[axis] is not None else size
            for axis, size in enumerate(shape)
        )


class PeftAdapter:
    """The matrices of a PEFT folder, one A and one B for each HF module of the base.

    Where peft stores those of all experts of a layer in one tensor (`target_parameters`), each expert's are views of
    it: A is `[experts * rank, in]`, and B `[out, rank * experts]` with the expert as the fastest index.
    """

    def __init__(self, folder: str | Path, table: RuleTable) -> None:
        """table: of the base model, with a name for each expert's matrices.

        Raises UserError for a kind of adapter that is not supported, and for files that are broken or inconsistent.
        """
        held = read_peft_folder(folder)
        raise_together(option_problems(held.config, held.folder / CONFIG) or matrix_problems(held))
        self.folder = held.folder
        self.path = held.weights
        self._places = {name: Place(name) for name in held.shapes}
        self._rename_routers(table)
        self._split_experts(held, table)
        self.shapes = {name: place.extent(held.shapes[place.name]) for name, place in self._places.items()}
        self.held = replace(held, shapes=self.shapes)
        self.settings = settings_of(self.held)
        self.modules, self.embeddings = self.held.weight_shapes, self.held.embeddings
        self.files = {self.path, self.folder / CONFIG}
        self._file: Any = None
        self._config_of_experts(held)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """A region of a matrix, by its key. Raises UserError if the file cannot be read."""
        return self.read_named(peft_name(key), region)

    def read_named(self, name: str, region: Region) -> torch.Tensor:
        """`read` for any tensor, by its name in the file."""
        place = self._places[name]
        try:
            if self._file is None:
                self._file = safe_open(self.path, framework="pt")
            stored = self._file.get_slice(place.name)
            if place.rows is None:
                return stored[as_slices(region)]
            whole = stored[place.rows]
            return (whole if place.columns is None else whole[:, place.columns])[as_slices(region)]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})", "copy the file again") from None

    def _rename_routers(self, table: RuleTable) -> None:
        """transformers 5 and peft call Mixtral's router `mlp.gate`, which its checkpoints call otherwise."""
        for module in router_modules(table):
            theirs = module.replace(".block_sparse_moe.", ".mlp.")
            for end in ("lora_A.weight", "lora_B.weight"):
                if place := self._places.pop(f"{PREFIX}{theirs}.{end}", None):
                    self._places[f"{PREFIX}{module}.{end}"] = place

    def _split_experts(self, held: PeftFolder, table: RuleTable) -> None:
        _refuse_turned(held, table)
        for layer, rules in _expert_layers(table).items():
            for module in (f"{layer}.experts.base_layer", f"{layer}.experts"):
                if module in held.modules:
                    rule = _rule_of(held, module, rules)
                    for matrix in "AB":
                        del self._places[f"{PREFIX}{module}.lora_{matrix}.weight"]
                    self._places |= _experts_places(held, module, rule)

    def _config_of_experts(self, held: PeftFolder) -> None:
        """Set the alphas of experts stored in one tensor, which peft looks up by the name of that tensor."""
        alphas = dict(self.settings.alpha_pattern)
        for name, place in self._places.items():
            if place.name == name:
                continue
            module, source = module_of(name), module_of(place.name)
            end = "down_proj" if module.endswith(DOWN) else "gate_up_proj"
            alpha = held.alpha_of(f"{source.removesuffix('.base_layer')}.{end}")
            if alpha != self.settings.alpha:
                alphas[module] = alpha
        self.settings = replace(self.settings, alpha_pattern=alphas)


def _expert_layers(table: RuleTable) -> dict[str, list[Experts]]:
    """Layer, by its name in transformers and by that in the files -> rules of its experts: (gate and up, down)."""
    layers: dict[str, list[Experts]] = {}
    for rule in table.rules:
        if isinstance(rule, Experts):
            layer = rule.hf[0].partition(".experts.")[0]
            for name in dict.fromkeys((layer, layer.rpartition(".")[0] + ".mlp")):
                layers.setdefault(name, []).append(rule)
    return layers


def _refuse_turned(held: PeftFolder, table: RuleTable) -> None:
    """Experts in one tensor of which no matrix is a linear layer here, as those of gpt-oss."""
    turned = {rule.hf[0].rpartition(".")[0] for rule in table.rules if isinstance(rule, TurnedExperts)}
    found = sorted(turned & {module.removesuffix(".base_layer") for module in held.modules})
    if found:
        raise UserError(
            f"{held.weights}: holds matrices of {found[0]}, and no adapter is supported on experts that a checkpoint "
            "keeps in one tensor, turned",
            "train it with `swift sft --backend fsdp`, or merge it with `swift export --merge_lora true`",
        )


def _rule_of(held: PeftFolder, module: str, rules: Sequence[Experts]) -> Experts:
    """The rule of the expert tensor that the matrices of `module` belong to. peft nests the two tensors' adapters."""
    gate_up, down = rules
    container = module.removesuffix(".base_layer")
    asked = [str(name).rpartition(".")[2] for name in held.config.get("target_parameters") or ()]
    both = f"{container}.base_layer" in held.modules
    if both:
        return gate_up if module.endswith(".base_layer") else down
    return down if "down_proj" in asked and "gate_up_proj" not in asked else gate_up


def _experts_places(held: PeftFolder, module: str, rule: Experts) -> dict[str, Place]:
    """Name of each expert's matrices -> where they are stored.

    Raises UserError if the shapes do not fit the experts.
    """
    experts = len(rule.hf) // rule.parts
    (rows, _), (out, columns) = held.modules[module]["A"], held.modules[module]["B"]
    if rows != columns or rows % experts or out % rule.parts:
        raise UserError(
            f"{held.weights}: {module} has matrices {list(held.modules[module]['A'])} and "
            f"{list(held.modules[module]['B'])}, which cannot be divided among {experts} experts",
            "it is an adapter of another base model",
        )
    rank, height = rows // experts, out // rule.parts
    name = f"{PREFIX}{module}"
    places = {}
    for number, weight in enumerate(rule.hf):
        expert, part = divmod(number, rule.parts)
        target = PREFIX + weight.removesuffix(".weight")
        places[f"{target}.lora_A.weight"] = Place(
            f"{name}.lora_A.weight", slice(expert * rank, (expert + 1) * rank)
        )
        places[f"{target}.lora_B.weight"] = Place(
            f"{name}.lora_B.weight",
            slice(part * height, (part + 1) * height),
            slice(expert, None, experts),
        )
    return places


def read_adapter(
    source: PeftAdapter,
    shards: Iterable[LiveShard],
    names: Iterable[str],
    table: RuleTable,
    settings: LoraSettings,
) -> None:
    """Fill this rank's shards of adapters and of weights trained in full beside them. Not collective.

    names: keys of all adapter tensors of the model, on any rank, to find tensors that the model has no place for.
    table: of the base model. Raises UserError for a matrix that is missing, has another shape, or fits no layer.
    """
    whole = beside(table, settings)
    wanted, stored = {*map(peft_name, names), *whole.files.values()}, set(source.shapes)
    # peft also saves the frozen weight of an embedding or output layer with an adapter
    known = wanted | whole.copies.keys() | whole.buffers
    known |= {name for name in stored if name.endswith(".base_layer.weight")}
    _refuse(source.path, sorted(wanted - stored), "lacks")
    _refuse(source.path, sorted(stored - known), "holds, for layers this model or its settings do not adapt,")
    shards = list(shards)
    keys = dict.fromkeys(shard.key for shard in shards)
    rules = _in_file(keys, table, whole).by_mcore
    for shard in shards:
        for name, shape in rules[shard.key].hf_shapes(shard.global_shape).items():
            if source.shapes[name] != shape:
                raise UserError(
                    f"{source.path}: {name} is {list(source.shapes[name])}, and the model takes {list(shape)}",
                    "it is an adapter of another base model, or of another rank",
                )
    with torch.no_grad():
        for shard in shards:
            rule = rules[shard.key]
            for block in rule.blocks(shard.region, rule.hf_shapes(shard.global_shape)):
                block.of(shard.data).copy_(source.read_named(block.name, block.hf))


def _refuse(path: Path, names: Sequence[str], verb: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{path}: {verb} {shown}", "it is an adapter of another base model")
