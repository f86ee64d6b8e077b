"""What an engine can do. Objectives and the training loop know no more of it than this."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from converters.budget import Budget
    from converters.ranks import Ranks
    from mcore_swift.data.batch import Batch
    from mcore_swift.models.shards import LiveShard
    from mcore_swift.objectives.base import Objective
    from mcore_swift.plan.layout import Layout


@dataclass
class StepResult:
    """What one optimizer step, or one evaluation step, amounts to over all ranks.

    loss: mean over the global batch. count: terms that mean is over (tokens to learn).
    grad_norm: of all parameters, before clipping; None when evaluating.
    metrics: further means; counts: terms of those that are not means over `count`.
    phases_s: seconds of each phase of the step on this rank.
    """

    loss: float
    count: int
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def mean(cls, results: "Iterable[StepResult]") -> "StepResult":
        """Loss and metrics over the terms of all results together."""
        total = cls(0.0, 0)
        for result in results:
            total.loss += result.loss * result.count
            total.count += result.count
            for name, value in result.metrics.items():
                terms = result.counts.get(name, result.count)
                total.metrics[name] = total.metrics.get(name, 0.0) + value * terms
                total.counts[name] = total.counts.get(name, 0) + terms
        total.loss /= max(total.count, 1)
        for name, terms in total.counts.items():
            total.metrics[name] /= max(terms, 1)
        return total


class Backend(Protocol):
    """A module `engines.<name>.backend`: from arguments to an engine."""

    def start(self, args: Any, layout: "Layout") -> None:
        """Join the processes of the run."""
        ...

    def stop(self) -> None:
        """Leave them."""
        ...

    def length_multiples(self, layout: "Layout") -> tuple[int, int]:
        """What the length of a row, and that of each sample in a row of several, is padded to a multiple of."""
        ...

    def read(self, args: Any) -> Any:
        """What is known of the model before it is built; `hf` is its transformers config. Raises UserError."""
        ...

    def build(
        self, plan: Any, layout: "Layout", args: Any, dtype: "torch.dtype", start: Path | None = None
    ) -> "Engine":
        """The model and its optimizer, the weights still to come (from the checkpoint `start`, if any). Collective."""
        ...


class Engine(Protocol):
    """A model laid out over processes, and its optimizer.

    name: of the engine, whose tensor names a checkpoint has. family: of the model. description: of how it is built,
    for people. dp_rank: which part of each global batch this process takes. saves_adapter: what it exports is an
    adapter, not a model.
    """

    layout: "Layout"
    dtype: "torch.dtype"
    name: str
    family: str
    description: str
    dp_rank: int
    saves_adapter: bool
    generators_name: str

    def begin(self, total_steps: int) -> None:
        """Told before the first step how many the run has. Raises UserError if what trains does not fit into them."""
        ...

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

    def load_hf(self, model_dir: str, ranks: "Ranks", budget: "Budget") -> str:
        """Fill the model from a Hugging Face folder; returns a line that tells how. Collective."""
        ...

    def initialize(self) -> None:
        """Fill the model with random weights, by the seed of the arguments and the same under every layout."""
        ...

    def export_hf(self, folder: Path, max_shard_bytes: int, ranks: "Ranks", budget: "Budget") -> None:
        """Write the weights, and what makes them a Hugging Face checkpoint, into an existing folder. Collective."""
        ...

    def export_merged(self, folder: Path, max_shard_bytes: int, ranks: "Ranks", budget: "Budget") -> None:
        """Where `saves_adapter` and the arguments ask for it: write the model with the adapter in it. Collective."""
        ...

    def describe_adapter(self, folder: Path) -> None:
        """Write the config of the adapter, where `saves_adapter`, into a checkpoint's folder. On one rank."""
        ...

    def check_budget(self, budget: "Budget", ranks: "Ranks") -> None:
        """Raise UserError, on every rank, if `export_hf` could not keep to the budget. Collective."""
        ...

    def training_flops(self, tokens: float, squares: float) -> float:
        """FLOPs of a step over `tokens` tokens, `squares` being the sum of the samples' squared lengths."""
        ...

    def random_state(self) -> dict[str, Any]:
        """This rank's random generators, to be kept under `generators_name`."""
        ...

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Put them back."""
        ...

    def after_load(self, parts: Sequence[str], *, optimizer_step: int) -> None:
        """Called when `parts` have been filled from a checkpoint."""
        ...
