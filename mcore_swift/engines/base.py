"""What an engine can do. Objectives and the training loop know no more of it than this."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mcore_swift.data.batch import Batch
    from mcore_swift.models.shards import LiveShard
    from mcore_swift.objectives.base import Objective
    from mcore_swift.plan.layout import Layout


@dataclass
class StepResult:
    """What one optimizer step, or one evaluation step, amounts to over all ranks.

    loss: mean over the global batch. count: terms that mean is over (tokens to learn).
    grad_norm: of all parameters, before clipping; None when evaluating.
    phases_s: seconds of each phase of the step on this rank.
    """

    loss: float
    count: int
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)


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

    def checkpoint_shards(self, holds: Sequence[str], *, for_loading: bool = False) -> "list[LiveShard]":
        """Views of what a checkpoint that `holds` 'weights' and / or 'optimizer' keeps of this rank."""
        ...

    def writes(self, shard: "LiveShard") -> bool:
        """Whether this rank, of those that hold the same values, saves them."""
        ...

    def optimizer_step(self) -> int:
        """Steps as the optimizer counts them."""
        ...

    def after_load(self, parts: Sequence[str], *, optimizer_step: int) -> None:
        """Called when `parts` have been filled from a checkpoint."""
        ...
