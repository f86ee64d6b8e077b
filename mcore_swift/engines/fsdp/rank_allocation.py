"""AdaLoRA (arXiv:2303.10512): adapters B·diag(E)·A whose least important triplets are pruned during training.

The adapters are peft's. The arithmetic is that of its `RankAllocator`, but on parts of tensors, so that it works for
sharded adapters. Its state (`STATES`) is kept in the optimizer's state and thus saved in checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mcore_swift.engines.fsdp.dtensor import local, local_region, shard_group
from mcore_swift.errors import UserError

SENSITIVITY, UNCERTAINTY, KEPT = "sensitivity", "uncertainty", "kept"
STATES = (SENSITIVITY, UNCERTAINTY, KEPT)


@dataclass(frozen=True)
class Triplets:
    """The factors of one adapter: a `[r, in]`, e `[r, 1]`, b `[out, r]`."""

    a: nn.Parameter
    e: nn.Parameter
    b: nn.Parameter

    @property
    def rank(self) -> int:
        return self.e.size(0)


class RankAllocation:
    """Prunes the triplets of a model's adapters to a budget that falls from all to `target_r` per layer on average."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any) -> None:
        """config: peft's AdaLoraConfig."""
        self._optimizer, self._config = optimizer, config
        named = dict(model.named_parameters())
        self._triplets = [
            Triplets(parameter, *(named[name.replace("lora_A", other)] for other in ("lora_E", "lora_B")))
            for name, parameter in sorted(named.items())
            if ".lora_A." in name
        ]
        self._all = sum(triplet.rank for triplet in self._triplets)
        self._target = config.target_r * len(self._triplets)
        self._group = shard_group([triplet.a for triplet in self._triplets])

    def set_total_steps(self, total: int) -> None:
        """Called before the first step. Raises UserError if the phases of the budget do not fit into the run."""
        c = self._config
        if c.tinit >= total - c.tfinal:
            raise UserError(
                f"--adalora_tinit {c.tinit} and --adalora_tfinal {c.tfinal} leave none of the run's {total} steps for "
                "pruning",
                "lower them, or train longer",
            )
        c.total_step = total

    @torch.no_grad()
    def make_states(self) -> None:
        """Create the state, if there is none yet: zero importance, all triplets kept.

        Call this after the optimizer's first step, or create the optimizer's own state too: an optimizer that finds any
        state for a parameter does not create its own.
        """
        for triplet in self._triplets:
            for parameter in (triplet.a, triplet.e, triplet.b):
                state = self._optimizer.state[parameter]
                for name in (SENSITIVITY, UNCERTAINTY):
                    state.setdefault(name, torch.zeros_like(parameter.data))
            self._optimizer.state[triplet.e].setdefault(KEPT, torch.ones_like(triplet.e.data))

    @torch.no_grad()
    def add_orthogonality(self, factor: float) -> float:
        """Add the gradient of the regularizer, times `factor`, to those of the loss; returns its value. Collective.

        It is orth_reg_weight times the mean, over the A and B of all adapters, of ||A A' - 1|| and ||B' B - 1||.
        """
        share = self._config.orth_reg_weight / (2 * len(self._triplets))
        total = 0.0
        for triplet in self._triplets:
            for parameter in (triplet.a, triplet.b):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
                rows = whole if parameter is triplet.a else whole.T
                off = rows @ rows.T
                off.diagonal().sub_(1)
                norm = off.norm()
                total += share * float(norm)
                gradient = 2 * (off / norm.clamp(min=1e-12)) @ rows
                gradient = gradient if parameter is triplet.a else gradient.T
                local(parameter.grad).add_(gradient[_rows(parameter)], alpha=factor * share)
        return total

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the importance of the triplets and prune them to the budget. step: counted from 1. Collective."""
        self.make_states()
        c = self._config
        last = c.total_step - c.tfinal
        if step < last:
            self._weigh()
        budget = self._budget(step)
        if step > last:
            self._mask()
        elif step == last or (step > c.tinit and step % c.deltaT == 0):
            self._choose(self._target if step == last else budget)
            self._mask()
            if step < last:  # pruned triplets may return until the last pruning
                for triplet in self._triplets:
                    local(self._optimizer.state[triplet.e][KEPT]).fill_(1)

    def _budget(self, step: int) -> int:
        """Number of triplets to keep, falling from all of them to the target as a cubic."""
        c = self._config
        if step <= c.tinit:
            return self._all
        left = max(0.0, 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit))
        return int((self._all - self._target) * left**3 + self._target)

    def _weigh(self) -> None:
        c = self._config
        for triplet in self._triplets:
            for parameter in (triplet.a, triplet.e, triplet.b):
                if parameter.grad is None:
                    continue
                state = self._optimizer.state[parameter]
                now = (local(parameter) * local(parameter.grad)).abs()
                mean, unsure = local(state[SENSITIVITY]), local(state[UNCERTAINTY])
                mean.mul_(c.beta1).add_(now, alpha=1 - c.beta1)
                unsure.mul_(c.beta2).add_((now - mean).abs(), alpha=1 - c.beta2)

    def _choose(self, budget: int) -> None:
        scores = torch.cat(list(self._scores()))
        if self._group is not None:
            dist.all_reduce(scores, group=self._group)
        leave = self._all - budget
        if leave <= 0:
            return
        threshold = scores.kthvalue(leave)[0]
        for triplet, own in zip(self._triplets, scores.split([t.rank for t in self._triplets]), strict=True):
            kept = local(self._optimizer.state[triplet.e][KEPT])
            kept.copy_((own > threshold)[_rows(triplet.e), None])

    def _scores(self) -> Iterator[Tensor]:
        """This rank's contribution to the importance of every triplet, `[r]` per adapter: the score of E plus the mean
        scores of A's row and B's column.
        """
        for triplet in self._triplets:
            a, e, b = (self._element_scores(p) for p in (triplet.a, triplet.e, triplet.b))
            score = b.sum(0) / triplet.b.size(0)
            score = score if len(b) else a.new_zeros(triplet.rank)
            score[_rows(triplet.a)] += a.mean(1)
            score[_rows(triplet.e)] += e[:, 0]
            yield score

    def _element_scores(self, parameter: nn.Parameter) -> Tensor:
        state = self._optimizer.state[parameter]
        return local(state[SENSITIVITY]) * local(state[UNCERTAINTY])

    def _mask(self) -> None:
        for triplet in self._triplets:
            local(triplet.e).mul_(local(self._optimizer.state[triplet.e][KEPT]))


def _rows(parameter: nn.Parameter) -> slice:
    """The rows of the whole parameter that are on this rank."""
    return slice(*local_region(parameter)[0])
