"""What the training loop knows of itself, and a checkpoint brings back."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """step: optimizer steps done. consumed_samples: samples (packing: rows) taken from the stream so far.

    best_loss, best_step: of the saved step with the smallest validation loss. data: position in the data, as its stages
    tell it.
    """

    step: int = 0
    consumed_samples: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
