"""Reading a Hugging Face checkpoint by regions: one safetensors file, or several with an index."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.dequantize import Source, dequantized
from converters.regions import numel
from converters.safetensors_format import parse_file
from converters.stored import RegionReader, StoredTensor
from mcore_swift.errors import UserError, raise_together
from mcore_swift.models.rules import Block, Region, Shape, full_region, region_shape
from mcore_swift.models.stored_form import AS_IS

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GET_AGAIN = "copy or download the file again"


class HFReader:
    """The tensors of a checkpoint folder, by name. Opening reads the headers only; nothing stays mapped.

        with HFReader("Qwen/Qwen3-0.6B") as reader:
            rows = reader.read("model.embed_tokens.weight", ((0, 16), (0, 1024)))

    Weights quantized in FP8 blocks or MXFP4 appear under their plain names and are dequantized when they are read;
    their scales do not appear. Raises UserError, or UserErrors with all problems, if the checkpoint is incomplete or
    quantized in another way.
    """

    def __init__(self, model_dir: str | Path, staging_bytes: int | None = None) -> None:
        """staging_bytes: size of the buffer for data that cannot be read straight into its target."""
        self.model_dir = Path(model_dir)
        stored = _find_tensors(self.model_dir)
        config = _config(self.model_dir)
        self.tensors: dict[str, Source] = (
            dict(stored) if config is None else dequantized(stored, config, self.model_dir)
        )
        self._reader = RegionReader(staging_bytes)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def shape(self, name: str) -> Shape:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(part.nbytes for tensor in self.tensors.values() for part in tensor.parts)

    @property
    def files(self) -> set[Path]:
        """What is read: weights, and the config that says how they are stored."""
        weights = {part.path for tensor in self.tensors.values() for part in tensor.parts}
        config = self.model_dir / "config.json"
        return weights | ({config} if config.is_file() else set())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read from files so far."""
        return self._reader.bytes_read

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A region of a tensor (all of it by default) as a new CPU tensor of `dtype(name)`."""
        region = full_region(self.shape(name)) if region is None else region
        out = torch.empty(region_shape(region), dtype=self.dtype(name))
        self.copy_into(name, region, out)
        return out

    def copy_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape, converting to its dtype and device.

        A contiguous CPU tensor of the stored dtype is filled directly, any other through a buffer of a few megabytes.
        """
        self.tensors[name].copy(self._reader, region, out)

    def files_of(self, name: str, region: Region) -> Iterator[tuple[Path, int]]:
        """Which files are read for a region, and about how many bytes of each."""
        tensor = self.tensors[name]
        share = numel(region) / max(1, numel(full_region(tensor.shape)))
        for part in tensor.parts:
            yield part.path, round(part.nbytes * share)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "HFReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CopiesRegions(Protocol):
    """A checkpoint of which regions of HF tensors can be read."""

    def copy_into(self, name: str, region: Region, out: torch.Tensor) -> None: ...


def copy_block(reader: CopiesRegions, block: Block, out: torch.Tensor) -> None:
    """Fill `out` with the values of a rule's block, in its shape."""
    if block.stored is AS_IS:
        reader.copy_into(block.name, block.hf, out)
        return
    box = block.stored.box(block.hf)
    dense = torch.empty(region_shape(box), dtype=out.dtype)
    reader.copy_into(block.name, box, dense)
    out.copy_(block.stored.view(dense, box, block.hf))


def _config(model_dir: Path) -> dict[str, Any] | None:
    """config.json, or None if there is none: then the weights are read as they are stored."""
    path = model_dir / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy=GET_AGAIN) from None
    return content if isinstance(content, dict) else {}


def _find_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    if not model_dir.is_dir():
        raise UserError(
            f"model folder {model_dir} does not exist",
            remedy="give the path of a Hugging Face checkpoint folder",
        )
    if (model_dir / SINGLE_FILE).is_file():
        return parse_file(model_dir / SINGLE_FILE)
    if (model_dir / INDEX_FILE).is_file():
        return _read_indexed(model_dir / INDEX_FILE)
    if any(model_dir.glob("pytorch_model*.bin")):
        raise UserError(
            f"{model_dir} holds pytorch_model.bin weights; only safetensors are read",
            remedy="save it anew: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise UserError(
        f"{model_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
        remedy="give the path of a Hugging Face checkpoint folder with safetensors weights",
    )


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no safetensors index", remedy=GET_AGAIN) from None
    errors: list[UserError] = []
    found: dict[str, dict[str, StoredTensor]] = {}
    for file_name in file_names:
        path = index.parent / file_name
        if not path.is_file():
            errors.append(UserError(f"{index} names {file_name}, which is missing", remedy=GET_AGAIN))
            continue
        try:
            found[file_name] = parse_file(path)
        except UserError as error:
            errors.append(error)
    for file_name, tensors in found.items():
        absent = [name for name, place in weight_map.items() if place == file_name and name not in tensors]
        if absent:
            errors.append(
                UserError(
                    f"{index} places {', '.join(absent)} in {file_name}, which does not hold it",
                    remedy="index and files are of different checkpoints: copy or download all of them again",
                )
            )
    raise_together(errors)
    return {name: found[file_name][name] for name, file_name in weight_map.items()}
