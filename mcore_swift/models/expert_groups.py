"""Group-limited choice of experts, as in DeepSeek's routers: only from the best groups."""

from typing import Any

import torch
from torch import Tensor


class GroupChoice:
    """Stands in for a router's `router_replay`, which megatron-core asks for the chosen experts.

    A group's score is the sum of its `best` highest expert scores: one in DeepSeek-V2 (arXiv:2405.04434, section
    2.2.2), two in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). megatron-core sums `top_k // groups chosen` instead.
    """

    def __init__(self, best: int) -> None:
        self.best = best

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: Any
    ) -> tuple[Tensor, Tensor]:
        """scores `[tokens, experts]` -> scores and indices of the chosen experts, each `[tokens, topk]`."""
        if not group_topk:
            return default(scores, topk)
        groups = scores.view(len(scores), num_groups, -1)
        goodness = groups.topk(self.best, dim=-1).values.sum(dim=-1)
        chosen = torch.zeros_like(goodness, dtype=torch.bool)
        chosen.scatter_(1, goodness.topk(group_topk, dim=-1).indices, True)
        within = groups.masked_fill(~chosen[..., None], float("-inf")).view_as(scores)
        return within.topk(topk, dim=-1)
