"""Quantized Hugging Face weights, read as plain tensors: only the blocks that a region touches are fetched.

FP8 in blocks (DeepSeek-V3, Qwen3-FP8): `w` float8_e4m3fn `[..., r, c]` and `w_scale_inv` `[..., ceil(r/b), ceil(c/b)]`;
a value is its float8 times the scale of its block (arXiv:2412.19437, 3.3).
MXFP4 (gpt-oss): `w_blocks` uint8 `[..., rows, g, 16]`, two e2m1 values a byte with the first in the low half, and
`w_scales` uint8 `[..., rows, g]`, the exponent of each 32 values with a bias of 127 (OCP Microscaling Formats 1.0).
transformers' tensor `w` is its transpose `[..., 32 g, rows]`.

Both are decoded by moving their bits into a float16, whose own subnormal numbers cover theirs: several times as
fast as a table or torch's conversion.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.stored import RegionReader, StoredTensor
from mcore_swift.errors import UserError, raise_together
from mcore_swift.models.rules import Region, Shape, region_shape
from mcore_swift.plan.quantization import REMEDY, quantization_problems

FP8_SCALE, FP4_BLOCKS, FP4_SCALES = "_scale_inv", "_blocks", "_scales"
DTYPE = torch.bfloat16
"""What dequantized weights count as; one that is read into float32 is not rounded in between."""

GROUP = 32
"""Values of MXFP4 that share an exponent."""

_WORKING = 8
"""Bytes that decoding needs for each value: the file's, float16, float32 and what is multiplied."""


@dataclass(frozen=True)
class BlockFP8:
    """A float8 tensor `[..., rows, columns]` and the scales of its blocks."""

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.weight, self.scale

    @property
    def nbytes(self) -> int:
        """Bytes when dequantized."""
        return self.weight.nbytes // self.weight.dtype.itemsize * DTYPE.itemsize

    def copy(self, reader: RegionReader, region: Region, out: Tensor) -> None:
        """Fill `out`, of the region's shape and any dtype, device or strides.

        Raises UserError for a value that is no number.
        """
        *lead, rows, columns = region
        height, width = self.block
        grid = tuple(
            (start // size, -(-stop // size))
            for (start, stop), size in zip((rows, columns), self.block, strict=True)
        )
        for at, prefix in _leading(lead):
            scales = torch.empty(region_shape(grid), dtype=self.scale.dtype)
            reader.copy(self.scale, (*prefix, *grid), scales.view(*[1] * len(prefix), *scales.shape))
            scales = _factors(scales)
            across = scales.repeat_interleave(width, dim=1)[:, columns[0] - grid[1][0] * width :]
            across = across[:, : columns[1] - columns[0]]
            for first, last in _row_parts(rows, height, columns[1] - columns[0], reader.staging_bytes):
                coded = torch.empty(last - first, columns[1] - columns[0], dtype=torch.float8_e4m3fn)
                reader.copy(
                    self.weight,
                    (*prefix, (first, last), columns),
                    coded.view(*[1] * len(prefix), *coded.shape),
                )
                values = self._multiplied(coded, across[first // height - grid[0][0]])
                out[at][first - rows[0] : last - rows[0]] = values

    def _multiplied(self, coded: Tensor, scales: Tensor) -> Tensor:
        """coded: `[n, c]` of one row of blocks; scales: `[c]`, 256 times the blocks'. fp32 `[n, c]`."""
        bits = coded.view(torch.uint8)
        values = coded.view(torch.int8).to(torch.int16)
        values <<= 7  # sign to bit 15 (and 14, whence the mask), exponent and mantissa to 13..7
        values &= ~0x4000
        values = values.view(torch.float16).to(
            torch.float32
        )  # float16's exponent has another bias: 2^-8 of it
        values *= scales
        # A sum shows what is not finite in a fraction of the time that a look at each value takes.
        if not torch.isfinite(values.sum()):
            values[(bits << 1) == 0] = 0  # a block of zeros may have any scale
        if (bits << 1).max() == 0xFE or not torch.isfinite(values).all():
            raise UserError(f"{self.weight.path} holds a float8 weight that is no number", remedy=REMEDY)
        return values


def _factors(scales: Tensor) -> Tensor:
    """Scales as stored -> fp32, times the 2^8 that decoding leaves out."""
    return scales.to(torch.float32) * 256.0


@dataclass(frozen=True)
class MXFP4:
    """Packed 4-bit values `[..., rows, groups, 16]`, an exponent for each group; read as `[..., 32 groups, rows]`."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> Shape:
        *lead, rows, groups, _ = self.blocks.shape
        return (*lead, groups * GROUP, rows)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.blocks, self.scales

    @property
    def nbytes(self) -> int:
        """Bytes when dequantized."""
        return 2 * self.blocks.nbytes * DTYPE.itemsize

    def copy(self, reader: RegionReader, region: Region, out: Tensor) -> None:
        """Fill `out`, of the region's shape and any dtype, device or strides.

        Raises UserError for a value that is no number.
        """
        *lead, columns, rows = region
        groups = columns[0] // GROUP, -(-columns[1] // GROUP)
        count = groups[1] - groups[0]
        inner = slice(columns[0] - groups[0] * GROUP, columns[1] - groups[0] * GROUP)
        for at, prefix in _leading(lead):
            extra = [1] * len(prefix)
            for first, last in _row_parts(rows, rows[1], count * GROUP, reader.staging_bytes):
                packed = torch.empty(*extra, last - first, count, GROUP // 2, dtype=torch.uint8)
                exponents = torch.empty(*extra, last - first, count, dtype=torch.uint8)
                place = (*prefix, (first, last), groups)
                reader.copy(self.blocks, (*place, (0, GROUP // 2)), packed)
                reader.copy(self.scales, place, exponents)
                if (exponents == 0xFF).any():
                    raise UserError(
                        f"{self.scales.path} holds an MXFP4 scale that is no number", remedy=REMEDY
                    )
                values = _fp4(packed.view(last - first, count, -1), exponents.view(last - first, count))
                out[at][:, first - rows[0] : last - rows[0]] = values[:, inner].t()


def _fp4(packed: Tensor, exponents: Tensor) -> Tensor:
    """uint8 `[n, g, 16]` and exponents `[n, g]` -> fp32 `[n, 32 g]`."""
    bits = packed.to(torch.int16)
    low = (bits << 9) & 0x0E00 | (bits << 12) & -0x8000  # exponent and mantissa to bits 11..9, sign to 15
    high = (bits << 5) & 0x0E00 | (bits << 8) & -0x8000
    # Its exponent's bias in float16 leaves 2^-14 of the value. float64: 2^-127 is no normal float32.
    factors = (exponents.to(torch.float64) - (127 - 14)).exp2().to(torch.float32)[..., None]
    values = torch.empty(*packed.shape, 2)
    torch.mul(low.view(torch.float16).to(torch.float32), factors, out=values[..., 0])
    torch.mul(high.view(torch.float16).to(torch.float32), factors, out=values[..., 1])
    return values.view(packed.shape[0], -1)


Quantized = BlockFP8 | MXFP4
Source = StoredTensor | Quantized


def dequantized(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], source: Path
) -> dict[str, Source]:
    """The tensors of a checkpoint as if it were not quantized: scales are folded into what they scale.

    config: of config.json. source: the folder, for messages.
    Raises UserErrors for another kind of quantization, and for tensors whose scales are missing or do not fit.
    """
    raise_together(quantization_problems(dict(config), str(source / "config.json")))
    settings = config.get("quantization_config") or {}
    block = tuple(settings.get("weight_block_size") or ())
    found: dict[str, Source] = {}
    used: set[str] = set()
    errors: list[UserError] = []
    for name, tensor in tensors.items():
        try:
            if tensor.dtype == torch.float8_e4m3fn:
                found[name] = _block_fp8(name, tensors, block)
                used.add(name + FP8_SCALE)
            elif tensor.dtype == torch.uint8 and name.endswith(FP4_BLOCKS):
                stem = name.removesuffix(FP4_BLOCKS)
                found[stem] = _mxfp4(stem, tensors)
                used |= {name, stem + FP4_SCALES}
            else:
                found[name] = tensor
        except ValueError as error:
            errors.append(UserError(f"{source}: {error}", remedy="get the complete checkpoint again"))
    raise_together(errors)
    if block:  # scales of activations serve a computation in FP8, which this is not
        used |= {name for name in found if name.endswith((".activation_scale", ".input_scale"))}
    return {name: tensor for name, tensor in found.items() if name not in used}


def _block_fp8(name: str, tensors: Mapping[str, StoredTensor], block: tuple[int, ...]) -> BlockFP8:
    weight, scale = tensors[name], tensors.get(name + FP8_SCALE)
    if not block:
        raise ValueError(
            f"{name} is float8, but config.json has no quantization_config that tells its blocks"
        )
    if scale is None:
        raise ValueError(f"{name} is float8, and its scales {name + FP8_SCALE} are missing")
    *lead, rows, columns = weight.shape
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != grid:
        raise ValueError(
            f"{name} of shape {list(weight.shape)} in blocks of {list(block)} has scales of shape"
            f" {list(scale.shape)}, not {list(grid)}"
        )
    if not scale.dtype.is_floating_point:
        raise ValueError(f"{name + FP8_SCALE} is of {scale.dtype}, scales of FP8 blocks are floating-point")
    return BlockFP8(weight, scale, (block[0], block[1]))


def _mxfp4(stem: str, tensors: Mapping[str, StoredTensor]) -> MXFP4:
    blocks, scales = tensors[stem + FP4_BLOCKS], tensors.get(stem + FP4_SCALES)
    if scales is None:
        raise ValueError(f"{stem + FP4_BLOCKS} has no {stem + FP4_SCALES} beside it")
    if len(blocks.shape) < 3 or blocks.shape[-1] != GROUP // 2 or scales.shape != blocks.shape[:-1]:
        raise ValueError(
            f"{stem}: blocks of shape {list(blocks.shape)} and scales of shape {list(scales.shape)} are no MXFP4"
        )
    return MXFP4(blocks, scales)


def _leading(lead: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Each index into the leading dimensions: where it lies in the region, and as a region of the whole."""
    for at in itertools.product(*(range(stop - start) for start, stop in lead)):
        yield at, tuple((start + n, start + n + 1) for n, (start, _) in zip(at, lead, strict=True))


def _row_parts(rows: tuple[int, int], height: int, columns: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut rows at the borders of blocks of `height`, and so that decoding a part takes no more than `limit` bytes."""
    most = max(1, limit // (columns * _WORKING))
    first, stop = rows
    while first < stop:
        last = min(stop, first + most, (first // height + 1) * height)
        yield first, last
        first = last
