"""Weights of any checkpoint under megatron-core's keys: what a conversion reads from, whatever the files are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from converters.adapters import AdapterSource
from converters.coverage import check_hf
from converters.hf_reader import HFReader, copy_block
from converters.regions import relative
from converters.safetensors_format import TensorSpec
from converters.torch_dist_reader import MCoreReader
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Block, Region, Rule, RuleTable, Shape, as_slices, region_shape
from mcore_swift.plan.adapter import PREFIX
from mcore_swift.tuners.beside import beside


class View(Protocol):
    """Whole tensors by megatron-core key, read by regions; `MCoreReader` is one. specs: what there is."""

    folder: Path
    specs: dict[str, TensorSpec]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: spec.shape for key, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are stored."""
        ...

    @property
    def files(self) -> set[Path]:
        """All files that are read."""
        ...

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]:
        """Which files are read for a region, and about how many bytes of each."""
        ...

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape, converting to its dtype and device."""
        ...


class HFView(View):
    """A Hugging Face checkpoint under megatron-core's keys. Raises UserErrors if it does not fit the table."""

    def __init__(self, reader: "HFReader | NamedWeights", table: RuleTable) -> None:
        self.reader, self.table = reader, table
        self.folder = reader.model_dir
        self._hf_shapes = reader.shapes
        shapes = check_hf(table, self._hf_shapes, str(reader.model_dir))
        self.specs = {
            rule.mcore: TensorSpec(rule.mcore, shapes[rule.mcore], self._widest(rule)) for rule in table.rules
        }

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
            copy_block(self.reader, block, block.of(out))

    def _widest(self, rule: Rule) -> torch.dtype:
        """The dtype that can represent all parts of a megatron-core tensor exactly."""
        widest, *others = (self.reader.dtype(name) for name in rule.hf)
        for other in others:
            widest = torch.promote_types(widest, other)
        return widest


class MergedView(View):
    """A view of a base model with an adapter merged, computed in float32 and rounded once."""

    def __init__(self, base: View, table: RuleTable, adapter: AdapterSource) -> None:
        """Raises UserError if the base lacks a layer of the adapter, or has one of another shape."""
        self.base, self.adapter = base, adapter
        self.folder, self.specs = base.folder, base.specs
        self._rules = table.matrices.by_mcore
        self._whole = beside(table, adapter.settings).files
        self._check(table.matrices)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    @property
    def files(self) -> set[Path]:
        return self.base.files | self.adapter.files

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]:
        return self.base.files_of(key, region)

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None:
        if not any(self._changes(block.name) for block in self._blocks(key, region)):
            self.base.copy_into(key, region, out)
            return
        read = region
        if self.adapter.settings.use_dora:  # the norm of a row needs the whole row
            read = (*region[:-1], (0, self.specs[key].shape[-1]))
        total = torch.empty(region_shape(read), dtype=torch.float32)
        self.base.copy_into(key, read, total)
        for block in self._blocks(key, read):
            if self._changes(block.name):
                self._merge(block, block.of(total))
        out.copy_(total[as_slices(relative(region, read))])

    def _blocks(self, key: str, region: Region) -> Iterator[Block]:
        rule = self._rules[key]
        return rule.blocks(region, rule.hf_shapes(self.base.specs[key].shape))

    def _changes(self, name: str) -> bool:
        module = _module(name)
        return name in self._whole or module in self.adapter.modules or module in self.adapter.embeddings

    def _merge(self, block: Block, values: torch.Tensor) -> None:
        """Merge the adapter into the values of a block, in place."""
        if block.name in self._whole:
            values.copy_(self.adapter.read_named(self._whole[block.name], block.hf))
            return
        module, (rows, columns) = _module(block.name), block.hf
        rank = (0, self.adapter.settings.rank_of(module))
        scaling, name = self.adapter.settings.scaling_of(module), f"{PREFIX}{module}."
        if module in self.adapter.embeddings:
            up = self.adapter.read_named(f"{name}lora_embedding_B", (columns, rank)).float()
            down = self.adapter.read_named(f"{name}lora_embedding_A", (rank, rows)).float()
            values.add_(scaling * (up @ down).t())
            return
        up = self.adapter.read_named(f"{name}lora_B.weight", (rows, rank)).float()
        down = self.adapter.read_named(f"{name}lora_A.weight", (rank, columns)).float()
        values.add_(scaling * (up @ down))
        if self.adapter.settings.use_dora:
            magnitudes = self.adapter.read_named(f"{name}lora_magnitude_vector", (rows,)).float()
            values.mul_((magnitudes / values.norm(dim=1))[:, None])

    def _check(self, table: RuleTable) -> None:
        shapes = {
            name: shape
            for rule in table.rules
            if rule.mcore in self.specs
            for name, shape in rule.hf_shapes(self.specs[rule.mcore].shape).items()
        }
        wanted = {f"{module}.weight": fits for module, fits in self.adapter.modules.items()}
        for module, held in self.adapter.embeddings.items():
            wanted[f"{module}.weight"] = (held["A"][1], held["B"][0])
        wanted |= {name: self.adapter.shapes[stored] for name, stored in self._whole.items()}
        for name, fits in wanted.items():
            shape = shapes.get(name)
            if shape != fits:
                found = "has no such weight" if shape is None else f"has shape {list(shape)}"
                raise UserError(
                    f"{self.adapter.folder}: its {name} is for shape {list(fits)}, and {self.folder} {found}",
                    "it is an adapter of another base model",
                )


class NamedWeights(MCoreReader):
    """A checkpoint written by the engine for transformers models, read by HF names: what `HFView` asks of a reader."""

    def __init__(self, folder: str | Path, table: RuleTable, staging_bytes: int | None) -> None:
        roots = frozenset(name.partition(".")[0] for name in (*table.by_hf, *table.optional_hf))
        super().__init__(folder, roots, staging_bytes)
        self.model_dir = Path(folder)

    def dtype(self, name: str) -> torch.dtype:
        return self.specs[name].dtype


def _module(name: str) -> str:
    return name.removesuffix(".weight")
