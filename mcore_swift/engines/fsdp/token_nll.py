"""Cross entropy of logits in chunks: no fp32 copy of all logits in the forward pass, one gradient in the backward."""

from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 24
"""Number of logits converted to fp32 at a time: 64 MB."""


def nll_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits) at the labels: fp32 `[n]`. logits: `[n, vocabulary]`, any floating dtype; labels: `[n]`."""
    return _NLL.apply(logits, labels)


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalizer = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        target = torch.empty_like(normalizer)
        for rows in _chunks(logits):
            wide = logits[rows].float()
            normalizer[rows] = wide.logsumexp(-1)
            target[rows] = wide.gather(1, labels[rows, None]).squeeze(1)
        ctx.save_for_backward(logits, labels, normalizer)
        return normalizer - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits is softmax - onehot."""
        logits, labels, normalizer = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = logits[rows].float().sub_(normalizer[rows, None]).exp_()
            part[torch.arange(len(part), device=part.device), labels[rows]] -= 1
            gradient[rows] = part.mul_(grad[rows, None]).to(gradient.dtype)
        return gradient, None


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, logits.size(-1)))
    return [slice(start, start + step) for start in range(0, len(logits), step)]
