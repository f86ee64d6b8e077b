"""What an engine can do. Objectives and the training loop know no more of it than this."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from mcore_swift.data.batch import Batch
    from mcore_swift.objectives.base import Objective
    from mcore_swift.plan.layout import Layout


@dataclass
class StepResult:
    """What one optimizer step, or one evaluation step, amounts to over all ranks.

    loss: mean over the global batch. count: terms that mean is over (tokens to learn).
    grad_norm: of all parameters, before clipping; None when evaluating.
    """

    loss: float
    count: int
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model laid out over processes, and its optimizer."""

    layout: "Layout"

    def train_step(
        self, microbatches: "Sequence[Batch]", objective: "Objective", *, lr: float, weight_decay: float
    ) -> StepResult:
        """Forward and backward over this rank's microbatches, then one optimizer step."""
        ...

    def evaluate_step(self, microbatches: "Sequence[Batch]", objective: "Objective") -> StepResult:
        """Forward only."""
        ...

    def save_state(self, directory: "Path", holds: Sequence[str], extra: dict[str, Any]) -> None:
        """Write this engine's part of a checkpoint into `directory`. Collective."""
        ...

    def load_state(self, directory: "Path", holds: Sequence[str]) -> dict[str, Any]:
        """Restore what `save_state` wrote, under this engine's layout; returns `extra`. Collective."""
        ...

    def export_hf(self, directory: "Path", *, source: str, max_shard_size: str) -> None:
        """Write the weights as a Hugging Face checkpoint. Collective."""
        ...
