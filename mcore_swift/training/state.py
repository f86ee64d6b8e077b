"""The state of the training loop, which checkpoints save and restore."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """step: completed optimizer steps. consumed_samples: samples (with packing: rows) used so far.

    best_loss, best_step: of the checkpoint with the lowest validation loss. data: state of the data pipeline.
    """

    step: int = 0
    consumed_samples: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
