"""The state of the training loop, which checkpoints save and restore."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """step: completed optimizer steps. consumed_samples: samples (with packing: rows) used so far.

    best_loss, best_step: of the checkpoint with the lowest validation loss. saves_since_best: checkpoints that were
    evaluated after it. data: state of the data pipeline.
    """

    step: int = 0
    consumed_samples: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    saves_since_best: int = 0
    data: dict[str, Any] = field(default_factory=dict)

    def judge(self, loss: float) -> None:
        """Compare the checkpoint of this step, with this validation loss, with the best one so far.

        Checkpoints are compared, not steps: a step that is not saved cannot be used.
        """
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.saves_since_best = loss, self.step, 0
        else:
            self.saves_since_best += 1

    def has_stalled(self, interval: int | None) -> bool:
        """Whether `interval` checkpoints in a row were no better than the best one; None: never."""
        return interval is not None and self.saves_since_best >= interval

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
