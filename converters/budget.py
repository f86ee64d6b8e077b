"""The memory that a process may use for pieces of weights while it converts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from converters.safetensors_format import TensorSpec
from converters.stored import STAGING_BYTES
from mcore_swift.config.checkpoint import size_bytes
from mcore_swift.errors import UserError

HELD = 5
"""Number of pieces in memory at a time: one being read, one being written, the copy that writing makes, the staging
buffer for data that cannot be read in place, and the memory to decode that."""

DECODING = 8
"""Maximum number of bytes per value while a tensor is read; needed to decode quantized ones."""


@dataclass(frozen=True)
class Budget:
    """`--memory_budget` in bytes; None: pieces have the fastest size, about 0.1 GB together.

    It limits the memory for pieces of weights, whatever the size of the tensors, in addition to the program itself.
    """

    nbytes: int | None = None

    @classmethod
    def of(cls, flag: str | None) -> Self:
        """From the value of the flag, such as 512MB, or None. Raises ValueError for an invalid size."""
        return cls(None if flag is None else size_bytes(flag))

    def piece(self, fastest: int) -> int:
        """Size of a piece in bytes: `fastest` if the budget allows."""
        return fastest if self.nbytes is None else max(1, min(fastest, self.nbytes // HELD))

    @property
    def staging(self) -> int:
        """Size in bytes of the buffer for data that cannot be read in place."""
        return self.piece(STAGING_BYTES)

    def check(self, specs: Iterable[TensorSpec]) -> None:
        """Raise UserError if one row of a tensor is larger than a piece."""
        if self.nbytes is None:
            return
        widest = max(specs, key=lambda spec: spec.shape[-1] if spec.shape else 1, default=None)
        if widest is None or not widest.shape:
            return
        row = widest.shape[-1] * DECODING
        if row > self.piece(row):
            raise UserError(
                f"--memory_budget of {self.nbytes} bytes: one row of {widest.name} takes up to {row} bytes while"
                f" it is converted, and {HELD} of its size are held at a time",
                remedy=f"give at least --memory_budget {-(-row * HELD // 1000)}KB; 1GB is more than is ever of use",
            )


UNBOUNDED = Budget()
