"""The second linear layer of an expert that has biases."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class ExpertRowLinear(RowParallelLinear):
    """Gives its bias to the expert, which adds it times the router's weight.

    megatron-core adds it in place to what autograd protects, takes it for a bias that tensor-parallel ranks have in
    common, and refuses experts with biases that are split over expert-tensor-parallel ranks (ETP). Of those each has
    a part of the output, still to be summed, and sees the gradient of the whole: so the first one adds the bias, and
    all have its gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Its gradient is not summed over tensor-parallel ranks, nor left out of the norm on all but the first,
            # except where they are ranks of ETP, which have copies.
            self.bias.sequence_parallel = False
            self.bias.tensor_model_parallel = True
            self.bias.shared = self.tp_group.rank() > 0

    def forward(self, input_: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, **kwargs)
        if bias is not None and self.bias.shared:
            bias = _NoneOfIt.apply(bias)
        return output.clone(), bias


class _NoneOfIt(torch.autograd.Function):
    """Zeros forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
