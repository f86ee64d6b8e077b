"""The second linear layer of an expert that has biases."""

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class ExpertRowLinear(RowParallelLinear):
    """Gives its bias to the expert, which adds it times the router's weight.

    megatron-core adds it in place to what autograd protects, and takes it for a bias that tensor-parallel ranks have
    in common. (Experts with biases are never split over ranks; the plan refuses it.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Its gradient is not summed over tensor-parallel ranks, nor left out of the norm on all but the first.
            self.bias.sequence_parallel = False
            self.bias.tensor_model_parallel = True

    def forward(self, input_: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, **kwargs)
        return output.clone(), bias
