"""Reading LoRA adapters from PEFT folders or checkpoints, and converting one into the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.manifest import Manifest, versions
from converters.peft_config import settings_of
from converters.peft_files import PeftAdapter, save_peft, write_config
from converters.pending import disk_errors, pending_directory
from converters.ranks import Ranks
from converters.shard_files import write_contents, write_shards
from converters.torch_dist_reader import MCoreReader
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Region, RuleTable, Shape, full_region, region_shape
from mcore_swift.models.shards import ADAPTER, LiveShard
from mcore_swift.plan.adapter import CONFIG, PREFIX, WEIGHTS, PeftFolder, read_config
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import adaptable_modules

MCORE = "mcore"
_PEFT_ENGINE = "fsdp"
"""The engine whose checkpoints have peft's parameter names."""


class AdapterSource(Protocol):
    """An adapter that can be read tensor by tensor.

    modules: modules of the base with matrices A and B -> shape of their weight. embeddings: those whose weight is the
    transpose of B A -> shapes of their 'A' and 'B'. shapes: of all tensors, by their names in a PEFT file.
    """

    folder: Path
    settings: LoraSettings
    modules: Mapping[str, Shape]
    embeddings: Mapping[str, Mapping[str, Shape]]
    shapes: Mapping[str, Shape]
    files: set[Path]

    def read_named(self, name: str, region: Region) -> torch.Tensor:
        """A region of a tensor, by its name in a PEFT file."""
        ...


class CheckpointAdapter:
    """The adapter in a checkpoint of either engine, read from its torch_dist files."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError if the checkpoint holds no adapter, or one of a kind that is not supported."""
        self.folder = Path(folder)
        named_by_peft = Manifest.read(folder).engine == _PEFT_ENGINE
        root = PREFIX.partition(".")[0] if named_by_peft else ADAPTER.rstrip(".")
        config = read_config(self.folder)
        refuse_whole_weights(config, self.folder)
        self._reader = MCoreReader(self.folder / MCORE, frozenset({root}))
        self._stored = {_peft_name(key): key for key in self._reader.specs}
        self.shapes = {name: self._reader.specs[key].shape for name, key in self._stored.items()}
        held = PeftFolder(self.folder, config, self.shapes)
        self.settings = settings_of(held)
        self.modules, self.embeddings = held.weight_shapes, held.embeddings
        self.files = self._reader.files | {self.folder / CONFIG}

    def read_named(self, name: str, region: Region) -> torch.Tensor:
        """A region of a tensor, by its name in a PEFT file. Raises UserError if the checkpoint is broken."""
        stored = self._stored[name]
        values = torch.empty(region_shape(region), dtype=self._reader.specs[stored].dtype)
        self._reader.copy_into(stored, region, values)
        return values


def _peft_name(key: str) -> str:
    """Name in a PEFT file of a key in either engine's checkpoint."""
    if key.startswith(ADAPTER):
        return PREFIX + key.removeprefix(ADAPTER)
    name = key.replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def refuse_whole_weights(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where whole weights were trained beside the matrices, and only the files of PEFT have them."""
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder}: modules_to_save and biases that train are read from PEFT folders only",
            "resume the run for a step with --save_safetensors true, and give the checkpoint it writes",
        )


def open_adapter(folder: str | Path, table: RuleTable) -> AdapterSource:
    """The adapter in a folder: a PEFT folder, or a checkpoint of a run that trained one.

    table: of the base model. Raises UserError if there is none, or if it is broken or of a kind that is not supported.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file() or not (folder / MCORE).is_dir():
        return PeftAdapter(folder, table.matrices)
    return CheckpointAdapter(folder)


def convert_adapter(
    source: AdapterSource, table: RuleTable, args: Any, ranks: Ranks, family: str, *, to_mcore: bool
) -> None:
    """Write an adapter alone as --output_dir: a checkpoint to start from, or a PEFT folder. Collective.

    The first rank does all of it and holds the whole adapter, which is small.
    """
    with pending_directory(args.output_dir, ranks, args.exist_ok) as folder:
        ranks.together(lambda: _write(source, table, args, folder, family, to_mcore), where=ranks.is_first)


def _write(
    source: AdapterSource, table: RuleTable, args: Any, folder: Path, family: str, to_mcore: bool
) -> None:
    if source.settings.modules_to_save or source.settings.bias != "none":
        raise UserError(
            f"{source.folder}: modules_to_save and biases that train are not converted with an adapter alone",
            "start from the PEFT folder with `megatron sft --adapters`, or merge it with --merge_lora true",
        )
    linear = adaptable_modules(table)
    adapted = {*source.modules, *source.embeddings}
    unknown = sorted(adapted - set(linear))
    if unknown:
        raise UserError(
            f"{source.folder}: has adapters for layers that support none in {args.model}: {', '.join(unknown[:3])}",
            "it is an adapter of another base model",
        )
    dtype = getattr(torch, args.torch_dtype) if args.torch_dtype else None
    tensors = {}
    for name, shape in source.shapes.items():
        values = source.read_named(name, full_region(shape))
        tensors[name] = (values if dtype is None else values.to(dtype)).contiguous()
    if not to_mcore:
        save_peft(folder, tensors, source.settings, args.model, linear)
        with disk_errors(folder):
            args.save(folder)
        return
    (folder / MCORE).mkdir()
    shards = [
        LiveShard(ADAPTER + name.removeprefix(PREFIX), tensor, full_region(tensor.shape), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    write_contents(folder / MCORE, [write_shards(folder / MCORE, 0, shards)], {"step": 0})
    write_config(folder, source.settings, adapted, linear, args.model)
    with disk_errors(folder):
        args.save(folder)
    held = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    Manifest(
        holds=["weights"],
        dtype=held.pop() if len(held) == 1 else None,
        family=family,
        versions=versions(),
        args="args.json",
    ).write(folder)
