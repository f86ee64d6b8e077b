"""megatron-core's top-k router with correctly weighted auxiliary losses, padding left out, and loads counted.

The choice of experts is megatron-core's (softmax or sigmoid scores, groups, expert bias, scaling factor, capacity).
What differs:

* The weight of an auxiliary loss depends only on its coefficient: the gradient of a step is that of

      main loss + sum over layers of (mean over the step's microbatches of coefficient * loss of the microbatch)

  under any TP, CP, DP, PP, EP and any loss mask. megatron-core multiplies by the router's own token count and
  divides by the number of *learnt* tokens, so that the losses weigh more the more of the text is prompt; in 0.16
  they are also too small by a factor of TP x CP.
* Padding does not count as load, enters no loss, and takes no expert capacity from real tokens. (megatron-core
  accepts a padding mask too, but its update of the expert bias fails with one.)
* Choices counted over the global batch are reset when its step ends; megatron-core's library itself never does that.
* Loads are counted for the log; megatron-core logs only the losses.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_capacity,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

BALANCE_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


class Router(TopKRouter):
    """Chooses `moe_router_topk` of `num_moe_experts` experts for each token.

    tally: fp32 `[experts + 2]`, sums over this rank's tokens since `begin_step`: the number of tokens that chose each
    expert, then this rank's share of the balance loss and of the z-loss, without their coefficients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: torch.nn.Module | None = None
        self.loss_weight: Tensor | float = 1.0
        self.tally = torch.zeros(self.num_experts + 2, device=torch.cuda.current_device())

    def gating(self, input: Tensor) -> Tensor:
        """`[s, b, h]` -> logits `[s, b, experts]`, including an adapter's contribution if there is one."""
        logits = super().gating(input)
        return logits if self.adapter is None else logits + self.adapter(input).to(logits.dtype)

    def begin_step(self, loss_weight: Tensor | float) -> None:
        """Reset the loads. loss_weight: the number that the main loss of a microbatch will be divided by."""
        self.loss_weight = loss_weight
        self.tally.zero_()
        self.reset_global_aux_loss_tracker()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits `[s, b, experts]`, padding_mask bool `[s, b]`, true at padding.

        Returns weights `[s * b, experts]`, zero for experts not chosen, and the choice, bool of the same shape.
        """
        s, b = logits.shape[:2]
        logits = logits.reshape(s * b, self.num_experts)
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )
        real = None if padding_mask is None else ~padding_mask.reshape(s * b)
        # Not in the forward pass before a recomputation: each token must count once.
        if self.training and torch.is_grad_enabled():
            probs = self._with_losses(probs, logits, real, s, b)
            self._count(chosen if real is None else chosen & real[:, None])
        if self.config.moe_expert_capacity_factor is not None:
            kept = self._within_capacity(probs, chosen if real is None else chosen & real[:, None])
            probs = probs * kept
            chosen = kept if self.config.moe_pad_expert_input_to_capacity else chosen & kept
        return probs, chosen

    @torch.no_grad()
    def _within_capacity(self, probs: Tensor, chosen: Tensor) -> Tensor:
        """bool `[tokens, experts]`: the tokens within each expert's capacity, by `moe_token_drop_policy`.

        Capacity is the factor times an even share of all tokens' choices (arXiv:2101.03961, equation 3). It includes
        padding, so as not to depend on the data. An expert with capacity left also gets tokens that did not choose it.
        """
        tokens = len(chosen)
        room = get_capacity(tokens * self.topk, self.num_experts, self.config.moe_expert_capacity_factor)
        if room >= tokens:
            return torch.ones_like(chosen)
        first = torch.arange(tokens, 0, -1, device=chosen.device)[:, None] / tokens  # 1, then down to above 0
        rank = probs if self.config.moe_token_drop_policy == "probs" else first
        best = torch.where(chosen, rank, first - 2).topk(room, dim=0).indices
        return torch.zeros_like(chosen).scatter(0, best, True)

    @torch.no_grad()
    def _count(self, chosen: Tensor) -> None:
        loads = chosen.sum(dim=0)
        self.tally[: self.num_experts] += loads
        if self.enable_expert_bias:
            self.local_tokens_per_expert += loads  # megatron-core moves the bias by these after the step

    def _with_losses(self, probs: Tensor, logits: Tensor, real: Tensor | None, s: int, b: int) -> Tensor:
        """`probs`; its backward pass also runs that of the losses."""
        total: Tensor | float = 0.0
        for kind in BALANCE_LOSSES:
            if coefficient := self.get_aux_loss_coeff(kind):
                loss = self._balance_loss(kind, logits, real, s, b)
                self.tally[self.num_experts] += loss.detach()
                total = total + coefficient * loss
        if coefficient := self.config.moe_z_loss_coeff:
            loss = self._z_loss(logits, real)
            self.tally[self.num_experts + 1] += loss.detach()
            total = total + coefficient * loss
        if not isinstance(total, Tensor):
            return probs
        weight = self.loss_weight if self.calculate_per_token_loss else 1.0
        return MoEAuxLossAutoScaler.apply(probs, total * weight)

    def _balance_loss(self, kind: str, logits: Tensor, real: Tensor | None, s: int, b: int) -> Tensor:
        """This rank's share of experts * sum over experts of (share of choices) * (mean score), 1 if even.

        arXiv:2101.03961, equation 4, with shares of all top-k choices; over a microbatch, each of its rows
        (arXiv:2405.04434, section 2.1.3; a packed row is one), or the global batch (arXiv:2501.11873). Choices
        here are the top scores, without groups or bias.
        """
        chosen, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        if real is not None:
            chosen, scores = chosen & real[:, None], scores * real[:, None]
        rows = b if kind == "seq_aux_loss" else 1
        chosen = chosen.view(-1, rows, self.num_experts).sum(dim=0).to(scores.dtype)
        scores = scores.view(-1, rows, self.num_experts).sum(dim=0)
        with torch.no_grad():
            choices = _summed(chosen, self.tp_cp_group)
            tokens = choices.sum(dim=-1, keepdim=True).clamp(min=1) / self.topk
            filled = (choices.sum(dim=-1) > 0).sum().clamp(min=1)
            if kind == "global_aux_loss":
                # Over the microbatches so far, so later ones see more of the batch.
                self.global_tokens_per_expert += _summed(chosen, self.tp_dp_cp_group).view(-1)
                choices = self.global_tokens_per_expert.view_as(chosen)
            share = choices / choices.sum(dim=-1, keepdim=True).clamp(min=1)
        each = self.num_experts * (share * scores / tokens).sum(dim=-1)
        return each.sum() / filled

    def _z_loss(self, logits: Tensor, real: Tensor | None) -> Tensor:
        """This rank's share of the mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)."""
        squares = logits.float().logsumexp(dim=-1).square()
        count = torch.full((), len(squares), dtype=torch.float32, device=squares.device)
        if real is not None:
            squares, count = squares * real, real.sum(dtype=torch.float32)
        return squares.sum() / _summed(count, self.tp_cp_group).clamp(min=1)


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, group=group)
    return tensor
