"""The safetensors file format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.stored import StoredTensor
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Shape

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that is to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def serialize_header(specs: Iterable[TensorSpec]) -> bytes:
    """The bytes before the tensors' own, padded so that these start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_file(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies.

    Raises UserError if the file is missing, has no valid header, or is not as long as the header says.
    """
    again = "copy or download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > MAX_HEADER_BYTES:
                raise UserError(f"{path} is no safetensors file: it has no valid header length", remedy=again)
            if 8 + length > size:
                raise UserError(
                    f"{path} is truncated: its header alone is {8 + length} bytes, the file {size}",
                    remedy=again,
                )
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a broken safetensors header: {error}", remedy=again) from None
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path} is {kind}: its header describes {expected} bytes, the file has {size}", remedy=again
        )
    return tensors


def _stored(path: Path, base: int, entry: dict) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    start, stop = entry["data_offsets"]
    tensor = StoredTensor(path, base + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if start < 0 or stop - start != tensor.nbytes:
        raise ValueError(f"shape {entry['shape']} does not fit data_offsets {entry['data_offsets']}")
    return tensor
