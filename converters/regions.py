"""Arithmetic on regions: boxes `((start, stop), ...)` with a half-open interval for each dimension."""

import math
from collections.abc import Iterator

from mcore_swift.models.rules import Block, Region, Shape


def intersection(first: Region, second: Region) -> Region | None:
    """The common box of both, or None if they do not overlap."""
    low_high = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(first, second, strict=True))
    return None if any(low >= high for low, high in low_high) else low_high


def relative(region: Region, origin: Region) -> Region:
    """`region` in coordinates relative to the start of `origin`."""
    return tuple((start - base, stop - base) for (start, stop), (base, _) in zip(region, origin, strict=True))


def absolute(region: Region, origin: Region) -> Region:
    """The inverse of `relative`."""
    return tuple((start + base, stop + base) for (start, stop), (base, _) in zip(region, origin, strict=True))


def numel(region: Region) -> int:
    """How many elements a box has."""
    return math.prod(stop - start for start, stop in region)


def clip(block: Block, region: Region) -> Block | None:
    """The part of `block` that lies in `region` of its HF tensor."""
    hf = intersection(block.hf, region)
    if hf is None:
        return None
    lead = len(block.mcore) - len(block.hf)
    inner = absolute(relative(hf, block.hf), block.mcore[lead:])
    return Block(block.name, hf, (*block.mcore[:lead], *inner), block.stored)


def slabs(shape: Shape, itemsize: int, max_bytes: int) -> Iterator[Region]:
    """Cut a tensor along its leading dimensions into boxes of at most `max_bytes` (but at least one element).

    Each box is contiguous and they are in row-major order, so writing them one after another writes the tensor. A
    tensor without elements yields none, a scalar yields `()`.
    """
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    row_bytes = itemsize * math.prod(shape[1:])
    rows = max_bytes // row_bytes
    if rows:
        inner = tuple((0, size) for size in shape[1:])
        for start in range(0, shape[0], rows):
            yield ((start, min(start + rows, shape[0])), *inner)
        return
    for row in range(shape[0]):
        for rest in slabs(shape[1:], itemsize, max_bytes):
            yield ((row, row + 1), *rest)
