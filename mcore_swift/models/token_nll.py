"""Output layer and cross entropy in one step, over the learnt positions only.

megatron-core computes logits for every position and then several vocabulary-sized tensors from them. Here there are no
logits for prompts and padding, and there is only one buffer of `[learnt, vocabulary / TP]`: it holds the logits in the
forward pass and their gradient in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    positions: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    scale: float = 1.0,
    softcap: float | None = None,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """-log p(label) at the given positions, 0 elsewhere: fp32 `[b, s]`.

    hidden: `[s, b, h]`, or `[s / TP, b, h]` with sequence parallelism. weight: this rank's rows of the output layer,
    `[padded vocabulary / TP, h]`. labels: int64 `[b, s]`. positions: int64 `[learnt]`, into the flattened labels.
    vocab_size: without padding, which stays out of the softmax; otherwise the loss would depend on TP.
    scale, softcap: applied to the logits first, see `transformed`.
    logits_of: an output layer that is more than its weight: `[learnt, h]`, the same on all ranks -> this rank's logits.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    # Not transposed first: the gradient of a transposed view has strides that slow all layers' matrix products.
    learnt = hidden.flatten(0, 1).index_select(0, _token_major(positions, labels.shape))
    if not sequence_parallel:  # sums the gradient over ranks; only here, where it is smaller
        learnt = copy_to_tensor_model_parallel_region(learnt)
    wanted = labels.reshape(-1)[positions]
    if logits_of is not None:
        nll = _NLLOfLogits.apply(logits_of(learnt), wanted, vocab_size, group, scale, softcap)
    else:
        nll = _VocabParallelNLL.apply(learnt, weight, wanted, vocab_size, group, scale, softcap)
    return (
        torch.zeros(labels.numel(), dtype=nll.dtype, device=nll.device)
        .index_put((positions,), nll)
        .view(labels.shape)
    )


def _token_major(positions: Tensor, shape: torch.Size) -> Tensor:
    """Indices into a flattened `[b, s]` -> indices of the same tokens in a flattened `[s, b]`."""
    b, s = shape
    return positions if b == 1 else positions % s * b + positions // s


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """scale * logits, squashed into (-softcap, softcap) by softcap * tanh(logit / softcap) (arXiv:2408.00118)."""
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap is not None else logits


class _VocabParallelNLL(torch.autograd.Function):
    """hidden `[n, h]`, weight `[rows, h]`, labels `[n]` -> -log softmax(hidden weight^T) at the labels, `[n]`.

    Each rank of `group` holds different rows of the weight; the softmax runs over all of them (Megatron-LM,
    arXiv:1909.08053, section 3). The gradient of the logits is softmax - onehot.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        nll, saved = _nll(ctx, hidden @ weight.t(), labels, vocab_size, group, scale, softcap)
        ctx.save_for_backward(hidden, weight, *saved)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *saved = ctx.saved_tensors
        gradient = _gradient_of_logits(ctx, saved, grad).to(weight.dtype)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        return (
            gradient @ weight if of_hidden else None,
            # the largest matrix product of all: skipped for a frozen weight
            gradient.t() @ hidden if of_weight else None,
            *(None,) * 5,
        )


class _NLLOfLogits(torch.autograd.Function):
    """The same from this rank's logits `[n, rows]`, before `transformed`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.dtype = logits.dtype
        nll, saved = _nll(ctx, logits.clone(), labels, vocab_size, group, scale, softcap)
        ctx.save_for_backward(*saved)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_gradient_of_logits(ctx, ctx.saved_tensors, grad).to(ctx.dtype), *(None,) * 5)


def _nll(
    ctx: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-log softmax at the labels, and what `_gradient_of_logits` needs. Overwrites the logits."""
    rows = logits.size(-1)
    first = rows * group.rank()
    logits = transformed(logits, scale, softcap)
    if vocab_size < first + rows:
        logits[:, max(0, vocab_size - first) :] = float("-inf")
    wide = logits.float()
    normalizer = _logsumexp_over_ranks(wide.logsumexp(-1), group)
    local = labels - first
    mine = ((local >= 0) & (local < rows)).nonzero().squeeze(-1)
    target = torch.zeros_like(normalizer)
    target[mine] = wide[mine, local[mine]]
    _all_reduce(target, dist.ReduceOp.SUM, group)
    ctx.scale, ctx.softcap = scale, softcap
    ctx.logits = wide  # kept out of save_for_backward: the backward pass overwrites it
    return normalizer - target, (normalizer, mine, local[mine])


def _gradient_of_logits(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
    """Gradient of the logits before `transformed`: fp32 `[n, rows]`, in the buffer that held the logits."""
    normalizer, mine, columns = saved
    gradient, ctx.logits = ctx.logits, None
    slope = _softcap_slope(gradient, ctx.softcap) if ctx.softcap is not None else None
    gradient.sub_(normalizer[:, None]).exp_()
    gradient[mine, columns] -= 1
    gradient.mul_(grad[:, None] * ctx.scale)
    return gradient if slope is None else gradient.mul_(slope)


def _softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of softcap * tanh(x / softcap), from its value: 1 - tanh^2. 0 for padding, at -inf."""
    return (1 - (capped / softcap).square()).clamp_(min=0)


def _logsumexp_over_ranks(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """logsumexp over all ranks' parts, from the logsumexp of each rank's own."""
    if group.size() == 1:
        return local
    largest = local.clone()
    _all_reduce(largest, dist.ReduceOp.MAX, group)
    total = (local - largest).exp()
    _all_reduce(total, dist.ReduceOp.SUM, group)
    return total.log() + largest


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op, group)
