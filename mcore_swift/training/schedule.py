"""Learning rate and weight decay as pure functions of the step, so that resuming needs no state.

Formulas are those of megatron-core's OptimizerParamScheduler, in steps instead of samples. Steps count from 0:
`lr(0)` is used by the first optimizer step, and with warm-up it is `lr_warmup_init`.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """max_lr, min_lr, warmup_init: learning rates. *_steps: optimizer steps. wd_*: weight decay at both ends."""

    max_lr: float
    min_lr: float
    warmup_init: float
    warmup_steps: int
    decay_steps: int
    style: str
    wsd_style: str
    wsd_steps: int
    wd_start: float
    wd_end: float
    wd_style: str
    total_steps: int

    @classmethod
    def from_args(cls, args: Any, total_steps: int) -> "Schedule":
        decay_steps = args.lr_decay_iters or total_steps
        warmup_steps = args.lr_warmup_iters
        if args.lr_warmup_fraction is not None:
            warmup_steps = round(args.lr_warmup_fraction * decay_steps)
        return cls(
            max_lr=args.lr,
            min_lr=args.min_lr,
            warmup_init=args.lr_warmup_init,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            style=args.lr_decay_style,
            wsd_style=args.lr_wsd_decay_style,
            wsd_steps=args.lr_wsd_decay_iters or 0,
            wd_start=args.start_weight_decay,
            wd_end=args.end_weight_decay,
            wd_style=args.weight_decay_incr_style,
            total_steps=total_steps,
        )

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`."""
        if step < self.warmup_steps:
            return self.warmup_init + (self.max_lr - self.warmup_init) * step / self.warmup_steps
        if self.style == "constant":
            return self.max_lr
        if step > self.decay_steps:
            return self.min_lr
        if self.style == "inverse-square-root":
            warmup = max(self.warmup_steps, 1)
            return max(self.min_lr, self.max_lr * math.sqrt(warmup / max(step, warmup)))
        if step == self.decay_steps:
            return self.min_lr
        return self.min_lr + (self.max_lr - self.min_lr) * self._fraction(step)

    def weight_decay(self, step: int) -> float:
        """Weight decay of optimizer step `step`."""
        progress = min(step / max(self.total_steps, 1), 1.0)
        if self.wd_style == "cosine":
            progress = 0.5 * (math.cos(math.pi * (1 - progress)) + 1)
        elif self.wd_style == "constant":
            progress = 0.0
        return self.wd_start + (self.wd_end - self.wd_start) * progress

    def _fraction(self, step: int) -> float:
        """How much of max_lr - min_lr is left at a step between warm-up and the end of the decay."""
        if self.style != "WSD":
            progress = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
            return _fall(self.style, progress)
        start = self.decay_steps - self.wsd_steps
        return 1.0 if step <= start else _fall(self.wsd_style, (step - start) / self.wsd_steps)


def _fall(style: str, progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if style == "linear":
        return 1 - progress
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * progress) + 1)
    if style == "exponential":
        return 2 * 0.5**progress - 1
    if style == "minus_sqrt":
        return 1 - math.sqrt(progress)
    raise ValueError(f"unknown decay {style!r}")
