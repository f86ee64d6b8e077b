"""How much memory a process may take for pieces of weights while it converts, and what it is spent on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from converters.safetensors_format import TensorSpec
from converters.stored import STAGING_BYTES
from mcore_swift.config.checkpoint import size_bytes
from mcore_swift.errors import UserError

HELD = 5
"""Pieces held at a time: one that is read while one is written, a copy that writing makes, what is read from a file
and cannot go straight to its place, and what decoding that needs."""

DECODING = 8
"""Bytes a value takes while a quantized tensor is decoded: the most that any reading needs."""


@dataclass(frozen=True)
class Budget:
    """`--memory_budget` in bytes, or None: then pieces are of the size that is fastest, about 0.1 GB together.

    It bounds the pieces of weights, whatever the size of the tensors; the program itself comes on top.
    """

    nbytes: int | None = None

    @classmethod
    def of(cls, flag: str | None) -> Self:
        """From the flag's text, such as 512MB; None if it was not given. Raises ValueError for no size."""
        return cls(None if flag is None else size_bytes(flag))

    def piece(self, fastest: int) -> int:
        """Bytes of a piece, `fastest` if the budget allows."""
        return fastest if self.nbytes is None else max(1, min(fastest, self.nbytes // HELD))

    @property
    def staging(self) -> int:
        """Bytes of what is read from a file and cannot go straight to its place."""
        return self.piece(STAGING_BYTES)

    def check(self, specs: Iterable[TensorSpec]) -> None:
        """Raise UserError if a single row of a tensor is more than a piece."""
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
