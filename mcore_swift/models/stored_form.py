"""Layouts of stored HF tensors that differ from the layout in which weight rules index them.

Rules index HF tensors in a *plain* form, `[experts, out, in]` for a matrix of each expert. The stored tensor may be
transposed and interleaved; code that reads or writes it asks here where a plain region lies.
"""

from dataclasses import dataclass
from typing import Any

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AsIs:
    """Stored in its plain form."""

    def box(self, region: Region) -> Region:
        """The smallest box of the stored tensor that holds a plain region."""
        return region

    def plain(self, box: Region) -> list[Region]:
        """The plain regions that a box of the stored tensor holds."""
        return [box]

    def view(self, tensor: Any, box: Region, region: Region) -> Any:
        """The values of a plain region, in its shape: a view of `tensor`, which is this box of the stored tensor."""
        return tensor[tuple(slice(a - base, b - base) for (a, b), (base, _) in zip(region, box, strict=True))]


@dataclass(frozen=True)
class Turned:
    """Plain: `[experts, parts * rows, ...]`. Stored: `[experts, ..., rows * parts]`, the parts interleaved.

    gpt-oss stores gate and up this way: the columns of an expert are gate 0, up 0, gate 1, up 1, ... A plain region
    must lie within one part; `plain` raises ValueError for a box that cuts through interleaved parts.
    """

    parts: int
    rows: int

    def box(self, region: Region) -> Region:
        experts, (start, stop), *rest = region
        first = start // self.rows * self.rows
        return (experts, *rest, ((start - first) * self.parts, (stop - first) * self.parts))

    def plain(self, box: Region) -> list[Region]:
        experts, *rest, (start, stop) = box
        if start % self.parts or stop % self.parts:
            raise ValueError(f"a box from {start} to {stop} cuts through {self.parts} interleaved parts")
        low, high = start // self.parts, stop // self.parts
        return [
            (experts, (part * self.rows + low, part * self.rows + high), *rest) for part in range(self.parts)
        ]

    def view(self, tensor: Any, box: Region, region: Region) -> Any:
        part = region[1][0] // self.rows
        dense = AsIs().view(tensor, box, self.box(region))
        return dense[..., part :: self.parts].movedim(-1, 1)


AS_IS = AsIs()
