"""Norms over the last dimension that support sequence parallelism (megatron-core's torch norm refuses it).

All compute in fp32 and return the dtype of their input. Each kind is a class, which a family names.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """Base class. normalization: megatron-core's name for the kind. initial: initial value of the weight; 0 if the
    weight is stored around 0 and 1 is added in use. has_bias: whether there is a bias as well.
    """

    normalization: ClassVar[str]
    initial: ClassVar[float] = 1.0
    has_bias: ClassVar[bool] = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = self._parameter(config, hidden_size, self.initial)
        self.bias = self._parameter(config, hidden_size, 0.0) if self.has_bias else None

    @staticmethod
    def _parameter(config: Any, size: int, value: float) -> nn.Parameter:
        parameter = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype))
        # Then each tensor-parallel rank sees a part of the tokens, so gradients are summed over the ranks.
        parameter.sequence_parallel = config.sequence_parallel
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., hidden]` -> the same shape and dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class RMSNorm(Norm):
    """x / rms(x) * weight (arXiv:1910.07467).

    Same order of casts as transformers' Llama-like norms: normalise in fp32, cast, then scale.
    """

    normalization = "RMSNorm"

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * _over_rms(x, self.eps).to(x.dtype)


class ZeroCentredRMSNorm(Norm):
    """x / rms(x) * (1 + weight), as in Gemma."""

    normalization = "RMSNorm"
    initial = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return ((1.0 + self.weight.float()) * _over_rms(x, self.eps)).to(x.dtype)


class LayerNormWithoutBias(Norm):
    """(x - mean(x)) / std(x) * weight (arXiv:1607.06450)."""

    normalization = "LayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.float() if self.bias is not None else None
        return _layer_norm(x, self.weight.float(), bias, self.eps)


class LayerNorm(LayerNormWithoutBias):
    """(x - mean(x)) / std(x) * weight + bias (arXiv:1607.06450)."""

    has_bias = True


class ZeroCentredLayerNorm(Norm):
    """(x - mean(x)) / std(x) * (1 + weight) + bias, as in Nemotron (arXiv:2402.16819)."""

    normalization = "LayerNorm"
    initial = 0.0
    has_bias = True

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, 1.0 + self.weight.float(), self.bias.float(), self.eps)


def _over_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) in fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
