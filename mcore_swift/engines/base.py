"""The interface of an engine: all that objectives and the training loop know of it."""

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
    """The result of one optimizer or evaluation step, over all ranks.

    loss: mean over the global batch. count: number of terms in that mean (tokens with a loss).
    grad_norm: of all parameters, before clipping; None when evaluating.
    metrics: further means; counts: number of terms of those whose count differs from `count`.
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
        """Loss and metrics over all results, weighted by their counts."""
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
    """The functions of a module `engines.<name>.backend`, which build an engine from arguments."""

    def start(self, args: Any, layout: "Layout") -> None:
        """Join the processes of the run."""
        ...

    def stop(self) -> None:
        """Leave them."""
        ...

    def length_multiples(self, layout: "Layout") -> tuple[int, int]:
        """(multiple for the length of a row, multiple for the length of each sample in a packed row)."""
        ...

    def read(self, args: Any) -> Any:
        """Read the model's description without building it; its `hf` is the transformers config. Raises UserError."""
        ...

    def check(self, plan: Any, args: Any, start: Path | None = None) -> None:
        """Told before the data is looked at. Raises UserError for what `build` could not do with this model."""
        ...

    def build(
        self, plan: Any, layout: "Layout", args: Any, dtype: "torch.dtype", start: Path | None = None
    ) -> "Engine":
        """Build the model and its optimizer. Collective. start: the checkpoint that fills the weights later, if any."""
        ...


class Engine(Protocol):
    """A model laid out over processes, and its optimizer.

    name: of the engine; a checkpoint can be resumed by the engine that wrote it. family: of the model. description:
    for the log. dp_rank: which part of each global batch this process takes. saves_adapter: checkpoints hold an
    adapter, not a model. generators_name: file name of this rank's random state.
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
        """Called before the first step. Raises UserError if a schedule that the engine owns does not fit."""
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
        """Views of this rank's part of a checkpoint that `holds` 'weights' and / or 'optimizer'."""
        ...

    def writes(self, shard: "LiveShard") -> bool:
        """Whether this rank, among those with a replica of the shard, is the one to save it."""
        ...

    def optimizer_step(self) -> int:
        """Number of steps taken, by the optimizer's own counter."""
        ...

    def load_hf(self, model_dir: str, ranks: "Ranks", budget: "Budget") -> str:
        """Fill the model from a Hugging Face folder; returns a line for the log. Collective."""
        ...

    def initialize(self) -> None:
        """Fill the model with random weights that depend on the seed, but not on the layout."""
        ...

    def export_hf(self, folder: Path, max_shard_bytes: int, ranks: "Ranks", budget: "Budget") -> None:
        """Write a Hugging Face checkpoint, or a PEFT folder if `saves_adapter`, into an existing folder. Collective."""
        ...

    def export_merged(self, folder: Path, max_shard_bytes: int, ranks: "Ranks", budget: "Budget") -> None:
        """Write the model with the adapter merged as a Hugging Face checkpoint. Collective."""
        ...

    def describe_adapter(self, folder: Path) -> None:
        """Write adapter_config.json into a checkpoint's folder. On one rank."""
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
        """Called after `parts` have been filled, so that the optimizer can follow."""
        ...
