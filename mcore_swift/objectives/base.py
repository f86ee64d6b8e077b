"""What a training objective is: arithmetic on the outputs of a model and a batch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import Batch


@dataclass
class Loss:
    """A *sum* and a *count*; the engine divides the sum by the count of the whole global batch.

    So a loss cannot depend on how the batch is split into microbatches, data-parallel ranks or packs.

    sum: scalar with a gradient. count: scalar int, the number of terms (tokens, pairs) in the sum.
    metrics: detached sums of further quantities, divided by the same count when they are reported.
    """

    sum: "Tensor"
    count: "Tensor"
    metrics: "dict[str, Tensor]" = field(default_factory=dict)


class Objective(Protocol):
    """Called on the last pipeline stage, with the negative log-likelihood of every label."""

    metrics: ClassVar[tuple[str, ...]]
    """Names of the metrics it reports, known to every rank so that they can be summed over all of them."""

    def count(self, batch: "Batch") -> "Tensor":
        """The count of its loss on this batch, known before the model has run."""
        ...

    def __call__(self, token_nll: "Tensor", batch: "Batch") -> Loss:
        """token_nll: fp32 `[b, s]`, -log p(labels[t] | tokens up to t), 0 where loss_mask is 0."""
        ...
