"""Weights of any checkpoint under megatron-core's keys: what a conversion reads from, whatever it reads.

A view has `folder`, `specs` and `shapes` by key, `nbytes` and `files`, tells with `files_of` what is read for a region
and fills tensors with `copy_into`, as `MCoreReader` does.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from converters.adapters import AdapterSource
from converters.coverage import check_hf
from converters.hf_reader import HFReader
from converters.safetensors_format import TensorSpec
from converters.torch_dist_reader import MCoreReader
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Block, Region, Rule, RuleTable, Shape, region_shape
from mcore_swift.models.shards import ADAPTER


class View(Protocol):
    """See the top of the file."""

    folder: Path
    specs: dict[str, TensorSpec]

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def files(self) -> set[Path]: ...

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]: ...

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None: ...


class HFView:
    """A Hugging Face checkpoint. Raises UserErrors if it and the table do not fit."""

    def __init__(self, reader: HFReader, table: RuleTable) -> None:
        self.reader, self.table = reader, table
        self.folder = reader.model_dir
        self._hf_shapes = reader.shapes
        shapes = check_hf(table, self._hf_shapes, str(reader.model_dir))
        self.specs = {
            rule.mcore: TensorSpec(rule.mcore, shapes[rule.mcore], self._widest(rule)) for rule in table.rules
        }

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: spec.shape for key, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        return self.reader.nbytes

    @property
    def files(self) -> set[Path]:
        return self.reader.files

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]:
        for block in self.table.by_mcore[key].blocks(region, self._hf_shapes):
            yield from self.reader.files_of(block.name, block.hf)

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None:
        for block in self.table.by_mcore[key].blocks(region, self._hf_shapes):
            self.reader.copy_block(block, block.of(out))

    def _widest(self, rule: Rule) -> torch.dtype:
        """The dtype that holds all parts of a megatron-core tensor without loss."""
        widest, *others = (self.reader.dtype(name) for name in rule.hf)
        for other in others:
            widest = torch.promote_types(widest, other)
        return widest


class MergedView:
    """Another view with an adapter added to its weights, in float32, rounded once to what is filled."""

    def __init__(self, base: View, table: RuleTable, adapter: AdapterSource) -> None:
        """Raises UserError if the base lacks a layer of the adapter, or has one of another shape."""
        self.base, self.adapter = base, adapter
        self.folder, self.specs = base.folder, base.specs
        self._rules = table.matrices.by_mcore
        self._check(table.matrices)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self.base.shapes

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    @property
    def files(self) -> set[Path]:
        return self.base.files | self.adapter.files

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]:
        return self.base.files_of(key, region)

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None:
        blocks = [block for block in self._blocks(key, region) if _module(block.name) in self.adapter.modules]
        if not blocks:
            self.base.copy_into(key, region, out)
            return
        total = torch.empty(region_shape(region), dtype=torch.float32)
        self.base.copy_into(key, region, total)
        for block in blocks:
            block.of(total).add_(self._delta(_module(block.name), block.hf))
        out.copy_(total)

    def _blocks(self, key: str, region: Region) -> Iterator[Block]:
        rule = self._rules[key]
        return rule.blocks(region, rule.hf_shapes(self.base.specs[key].shape))

    def _delta(self, module: str, region: Region) -> torch.Tensor:
        rows, columns = region
        ranks = (0, self.adapter.settings.rank_of(module))
        up = self.adapter.read(f"{ADAPTER}{module}.lora_B.weight", (rows, ranks))
        down = self.adapter.read(f"{ADAPTER}{module}.lora_A.weight", (ranks, columns))
        return self.adapter.settings.scaling_of(module) * (up.float() @ down.float())

    def _check(self, table: RuleTable) -> None:
        shapes = {
            name: shape
            for rule in table.rules
            if rule.mcore in self.specs
            for name, shape in rule.hf_shapes(self.specs[rule.mcore].shape).items()
        }
        for module, fits in self.adapter.modules.items():
            shape = shapes.get(f"{module}.weight")
            if shape != fits:
                found = "has no such layer" if shape is None else f"has {list(shape)} there"
                raise UserError(
                    f"{self.adapter.folder}: its matrices of {module} are for {list(fits)}, and {self.folder} {found}",
                    "it is an adapter of another base model",
                )


class NamedWeights:
    """A checkpoint that the engine for transformers' models wrote, read as `HFReader` reads files of weights."""

    def __init__(self, folder: str | Path, table: RuleTable, staging_bytes: int | None) -> None:
        roots = frozenset(name.partition(".")[0] for name in (*table.by_hf, *table.optional_hf))
        self._reader = MCoreReader(folder, roots, staging_bytes)
        self.model_dir = Path(folder)

    @property
    def shapes(self) -> dict[str, Shape]:
        return self._reader.shapes

    @property
    def nbytes(self) -> int:
        return self._reader.nbytes

    @property
    def files(self) -> set[Path]:
        return self._reader.files

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.specs[name].dtype

    def files_of(self, name: str, region: Region) -> Iterator[tuple[Path, int]]:
        return self._reader.files_of(name, region)

    def copy_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        self._reader.copy_into(name, region, out)

    def copy_block(self, block: Block, out: torch.Tensor) -> None:
        """Fill `out` with the values of a rule's block, in its shape."""
        box = block.stored.box(block.hf)
        dense = torch.empty(region_shape(box), dtype=out.dtype)
        self.copy_into(block.name, box, dense)
        out.copy_(block.stored.view(dense, box, block.hf))

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "NamedWeights":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _module(name: str) -> str:
    return name.removesuffix(".weight")
