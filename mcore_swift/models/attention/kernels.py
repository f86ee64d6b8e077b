"""Which kernel attends: torch's own where it can, else ours block by block. No S x S matrix and no S x S mask."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from mcore_swift.models.attention.blockwise import Form, blockwise_attention

BLOCK = 256  # queries that share one mask


def attend(query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None = None) -> Tensor:
    """query `[b, heads, n, dk]`, key `[b, groups, m, dk]`, value `[b, groups, m, dv]` -> `[b, heads, n, dv]`.

    Causal: query i sees keys up to number m - n + i. sinks: `[heads]`, see `blockwise_attention`.
    """
    n, m = query.size(2), key.size(2)
    # torch's kernel for CPU knows no dropout; asked for it, torch would make the whole matrix.
    if sinks is not None or form.softcap is not None or (form.dropout and not query.is_cuda):
        return blockwise_attention(query, key, value, form, sinks)
    if form.window is None or form.window >= m:
        if n == m:
            return _sdpa(query, key, value, form, is_causal=True)
        if query.is_cuda:
            return _sdpa(query, key, value, form, attn_mask=causal_lower_right(n, m))
        return _in_blocks(query, key, value, form, window=m)
    return _in_blocks(query, key, value, form, window=form.window)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, form: Form, window: int) -> Tensor:
    """Block after block of queries, each with the keys it sees and a mask of that size."""
    n, m = query.size(2), key.size(2)
    block = min(BLOCK, max(window, BLOCK // 8))
    out = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        first, last = max(0, m - n + start + 1 - window), m - n + stop
        behind = (
            torch.arange(m - n + start, last, device=query.device)[:, None]
            - torch.arange(first, last, device=query.device)[None, :]
        )
        seen = (behind >= 0) & (behind < window)
        keys, values = key[:, :, first:last], value[:, :, first:last]
        out.append(_sdpa(query[:, :, start:stop], keys, values, form, attn_mask=seen))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, form: Form, **mask: Any) -> Tensor:
    dv = value.size(-1)
    if not query.is_cuda:  # only heads of one size go into the blockwise kernel for CPU
        query, key, value = same_head_size(query, key, value)
    grouped = key.size(1) != query.size(1)
    if grouped and query.is_cuda:  # of the kernels for CUDA not all take groups
        repeat = query.size(1) // key.size(1)
        key, value, grouped = *(t.repeat_interleave(repeat, dim=1) for t in (key, value)), False
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=form.dropout, scale=form.scale, enable_gqa=grouped, **mask
    )
    return out[..., :dv]


def same_head_size(*tensors: Tensor) -> list[Tensor]:
    """Fill the last dimension up with zeros: they add nothing to scores, and their values are cut off again."""
    size = max(tensor.size(-1) for tensor in tensors)
    return [
        functional.pad(tensor, (0, size - tensor.size(-1))) if tensor.size(-1) < size else tensor
        for tensor in tensors
    ]
