"""The second linear layer of an expert that has biases."""

from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class ExpertRowLinear(RowParallelLinear):
    """Gives its bias to the expert, which adds it times the router's weight, before ranks' outputs are added up.

    So each expert-tensor-parallel rank adds its share of the bias, and its gradient is that of the whole. (In
    megatron-core each adds all of it, in place, where autograd allows no such thing.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            # Summed over the ranks that hold copies of the expert, and not over tensor-parallel ranks once more.
            self.bias.sequence_parallel = False

    def forward(self, input_: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, **kwargs)
        if bias is None:
            return output, None
        fixed = bias.detach()
        return output.clone(), fixed / self.tp_group.size() + (bias - fixed)
