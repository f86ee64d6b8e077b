"""Checks that the safetensors files of a folder are complete. Reads headers, no weights.

File format: 8 bytes little-endian length N of the header, N bytes of JSON (tensor name -> dtype, shape,
data_offsets relative to the end of the header), then the data without gaps
(https://huggingface.co/docs/safetensors#format).
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_COPY_AGAIN = "copy or download the file again"


class BrokenFile(Exception):
    """An invalid safetensors file; the text says why."""


def weight_problems(folder: Path) -> list[UserError]:
    """What is missing or broken among the weight files of a checkpoint folder."""
    index = folder / INDEX
    if index.exists():
        return _sharded_problems(folder, index)
    if (folder / SINGLE).exists():
        return _file_problems(folder / SINGLE, [])
    others = sorted(path.name for path in folder.glob("*.bin"))
    if others:
        remedy = "load it with transformers and write it with save_pretrained, which makes safetensors"
        return [UserError(f"{folder}: weights are in {others[0]}, and only safetensors are read", remedy)]
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (it holds {', '.join(parts[:3])}{' ...' if len(parts) > 3 else ''})" if parts else ""
    return [
        UserError(
            f"{folder}: neither {SINGLE} nor {INDEX}{found}", "give the folder of a complete checkpoint"
        )
    ]


def tensor_names(folder: Path) -> list[str]:
    """Names of the weights in a checkpoint folder; none if it has only a config, or files that cannot be read.

    This only tells which form the weights have; `weight_problems` checks whether they are complete. For MXFP4 weights,
    stored under names that end in `_blocks`, it returns the plain names.
    """
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        if (folder / SINGLE).exists():
            with (folder / SINGLE).open("rb") as file:
                names = list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
        else:
            names = list(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    return [name.removesuffix("_blocks") for name in names]


def multi_token_names(names: Iterable[str], num_layers: int, depths: int) -> set[str]:
    """The names that belong to multi-token layers, which checkpoints number after the decoder's layers."""
    prefixes = tuple(f"model.layers.{number}." for number in range(num_layers, num_layers + depths))
    return {name for name in names if name.startswith(prefixes)}


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file (name -> dtype, shape, data_offsets), after checking the file's size.

    Raises BrokenFile for an invalid header, or a file whose size differs from what the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise BrokenFile(f"it has {size} bytes, too few for its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise BrokenFile("its header is damaged") from None
    expected = 8 + length + end
    if size < expected:
        raise BrokenFile(f"it is truncated: {size} of {expected} bytes")
    if size > expected:
        raise BrokenFile(f"it has {size} bytes, and its header describes {expected}")
    return header


def _sharded_problems(folder: Path, index: Path) -> list[UserError]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {}
        for tensor, name in weight_map.items():
            files.setdefault(str(name), []).append(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        return [UserError(f"{index}: cannot be read as a safetensors index ({what})", _COPY_AGAIN)]
    problems: list[UserError] = []
    missing = [name for name in sorted(files) if not (folder / name).exists()]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        problems.append(
            UserError(f"{index}: names files that are not there: {some}", "complete the download")
        )
    for name in sorted(set(files) - set(missing)):
        problems += _file_problems(folder / name, files[name])
    return problems


def _file_problems(path: Path, wanted: list[str]) -> list[UserError]:
    try:
        header = read_header(path)
    except BrokenFile as error:
        return [UserError(f"{path}: {error}", _COPY_AGAIN)]
    except OSError as error:
        return [UserError(f"{path}: cannot be read ({error.strerror})", "check its permissions")]
    absent = [name for name in wanted if name not in header]
    if absent:
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        return [UserError(f"{path}: lacks tensors that {INDEX} places there: {some}", _COPY_AGAIN)]
    return []
