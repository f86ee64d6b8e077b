"""What an engine reports about one training step. All later numbers (log lines, MFU, plots) come from this."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, in global numbers: summed or reduced over all ranks, not one rank's share.

    step: 1-based number of the step just done.
    loss: sum of the token losses divided by `loss_count`.
    tokens: real tokens of the step, prompts included, padding excluded.
    loss_count: what `loss` is a mean over (tokens with a label, or pairs); None counts as `tokens`.
    padded_tokens: padding positions that were computed in addition to the real tokens.
    samples: training samples, before packing.
    flops: model FLOPs of forward and backward, recomputation not counted (the usual numerator of MFU).
    step_time_s: wall time from the end of the previous step to the end of this one, waiting for data
        included, saves and evaluations excluded.
    data_wait_s: the part of `step_time_s` in which a device waited for its batch; maximum over all ranks.
    memory_peak_bytes: maximum over all ranks.
    metrics: further numbers of the objective, each a mean over `loss_count`.
    phases_s: seconds by phase, from `PhaseTimer.take`.
    num_zeros: zero entries of the gradient, if they were counted.
    skipped: the optimizer did not step (the gradient was not finite); loss and gradient norm then do not belong
        on the curve.
    consumed_samples, epoch: position in the data after the step; epoch 1.5 is the middle of the second one.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    loss_count: float | None = None
    padded_tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    step_time_s: float
    data_wait_s: float = 0.0
    memory_peak_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    phases_s: Mapping[str, float] = field(default_factory=dict)
    num_zeros: int | None = None
    skipped: bool = False
    consumed_samples: int = 0
    epoch: float = 0.0
