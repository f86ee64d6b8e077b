"""Query and key norms whose weight differs from head to head, so that tensor parallelism splits it.

The plain kind, one weight shared by all heads, needs no class here: it is a norm over the head dimension.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from mcore_swift.models.collectives import SumOverRanks


class _HeadNorm(nn.Module):
    """A weight for `heads * head_dim` values, of which each tensor-parallel rank holds those of its own heads.

    Raises ValueError if the heads do not divide over the tensor-parallel ranks.
    """

    def __init__(self, config: Any, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.group = parallel_state.get_tensor_model_parallel_group()
        if heads % self.group.size():
            raise ValueError(f"{heads} heads do not divide over {self.group.size()} tensor-parallel ranks")
        self.width = heads * head_dim
        shape = self._shape(heads // self.group.size(), head_dim)
        self.weight = nn.Parameter(torch.ones(shape, dtype=config.params_dtype))
        # Each rank's gradient is complete, and every rank's part counts in the gradient norm.
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = 0, 1

    def _shape(self, heads: int, head_dim: int) -> tuple[int, ...]:
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class FullNorm(_HeadNorm):
    """RMSNorm over all heads of a token together, as in OLMo 2 (arXiv:2501.00656)."""

    def _shape(self, heads: int, head_dim: int) -> tuple[int, ...]:
        return (heads * head_dim,)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[s, b, heads / TP, head_dim]`."""
        wide = x.float().flatten(-2)
        squares = SumOverRanks.apply(wide.pow(2).sum(-1, keepdim=True), self.group)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view(x.shape)


class EachHeadNorm(_HeadNorm):
    """LayerNorm without bias over each head, with a weight for each head, as in Command R+."""

    def _shape(self, heads: int, head_dim: int) -> tuple[int, ...]:
        return (heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[s, b, heads / TP, head_dim]`."""
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight.float() * normed).to(x.dtype)
