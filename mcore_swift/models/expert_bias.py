"""The second linear layer of an expert that has biases."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class ExpertRowLinear(RowParallelLinear):
    """Hands its bias to the expert, which adds it multiplied by the router's weight.

    megatron-core adds the bias in place to a tensor that autograd does not let it modify, assumes that all
    tensor-parallel ranks hold the same bias, and refuses to split experts with biases over expert-tensor-parallel
    ranks (ETP). Under ETP each rank computes a partial output, which is summed later, and gets the gradient of the
    sum. So only the first rank adds the bias, and every rank gets its full gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Its gradient is not summed over tensor-parallel ranks, and every rank's counts in the gradient norm,
            # except on ETP ranks after the first, which hold copies.
            self.bias.sequence_parallel = False
            self.bias.tensor_model_parallel = True
            self.bias.shared = self.tp_group.rank() > 0

    def forward(self, input_: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[tokens, ffn / ETP]` -> output `[tokens, h]` without bias, and the bias `[h]` (ETP ranks > 0: zeros)."""
        output, bias = super().forward(input_, **kwargs)
        if bias is not None and self.bias.shared:
            bias = _NoneOfIt.apply(bias)
        return output.clone(), bias


class _NoneOfIt(torch.autograd.Function):
    """Zeros in the forward pass; the unchanged gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
