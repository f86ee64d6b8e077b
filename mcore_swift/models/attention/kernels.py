"""Chooses the attention kernel: torch's own if possible, else our blockwise one. None builds an S x S matrix."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from mcore_swift.models.attention.blockwise import Form, blockwise_attention
from mcore_swift.models.attention.flex import flex_pieces, have_flex
from mcore_swift.models.segments import Segments

BLOCK = 256  # queries that share one mask


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, form: Form, sinks: Tensor | None = None
) -> Tensor:
    """Each token of a rank attends to its segment: query `[s / N, b, heads, dk]` -> `[s / N, b, heads, dv]`.

    key `[s, b, groups, dk]`, value `[s, b, groups, dv]`: of the whole row, in its order.
    """
    pieces = segments.pieces
    if _fits_varlen(query, form, sinks) and len(pieces) > 1:
        return _varlen(query, key, value, segments, form)
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if query.is_cuda and _fits_flex(form, sinks):
        return flex_pieces(query, key, value, segments, form, sinks).permute(2, 0, 1, 3)
    out = []
    for part, piece in zip(query.split([piece.queries for piece in pieces], dim=2), pieces, strict=True):
        first = piece.first
        if form.window is not None:
            first = max(first, piece.last - piece.queries + 1 - form.window)
        seen = slice(first, piece.last)
        out.append(attend(part, key[:, :, seen], value[:, :, seen], form, sinks))
    return (out[0] if len(out) == 1 else torch.cat(out, dim=2)).permute(2, 0, 1, 3)


def attend(query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None = None) -> Tensor:
    """query `[b, heads, n, dk]`, key `[b, groups, m, dk]`, value `[b, groups, m, dv]` -> `[b, heads, n, dv]`.

    Causal: query i sees keys up to number m - n + i. sinks: `[heads]`, see `blockwise_attention`.
    """
    n, m = query.size(2), key.size(2)
    # torch's CPU kernel has no dropout; asked for it, torch would build the whole score matrix.
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
    """Attention by blocks of queries, each with only the keys it sees and a mask of that size."""
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
    if not query.is_cuda:  # torch's blockwise CPU kernel needs heads of one size
        query, key, value = same_head_size(query, key, value)
    grouped = key.size(1) != query.size(1)
    if grouped and query.is_cuda:  # not all CUDA kernels support groups
        repeat = query.size(1) // key.size(1)
        key, value, grouped = *(t.repeat_interleave(repeat, dim=1) for t in (key, value)), False
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=form.dropout, scale=form.scale, enable_gqa=grouped, **mask
    )
    return out[..., :dv]


def same_head_size(*tensors: Tensor) -> list[Tensor]:
    """Pad the last dimension with zeros to one size: they add nothing to scores; callers cut them off the output."""
    size = max(tensor.size(-1) for tensor in tensors)
    return [
        functional.pad(tensor, (0, size - tensor.size(-1))) if tensor.size(-1) < size else tensor
        for tensor in tensors
    ]


def _fits_varlen(query: Tensor, form: Form, sinks: Tensor | None) -> bool:
    """Whether torch's variable-length kernel can be used: on CUDA, in bf16 or fp16."""
    plain = form.softcap is None and sinks is None and not form.dropout and query.size(1) == 1
    fits_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return plain and fits_kernel and query.size(-1) % 8 == 0 and _varlen_attention() is not None


def _fits_flex(form: Form, sinks: Tensor | None) -> bool:
    """Whether flex_attention can be used and no other fused kernel can."""
    special = form.softcap is not None or sinks is not None or form.window is not None
    return special and not form.dropout and have_flex()


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, form: Form) -> Tensor:
    """`attend_pieces` with all pieces in one kernel call; b must be 1."""
    repeat, dv, runs = query.size(2) // key.size(2), value.size(-1), segments.for_varlen
    key, value = (
        (tensor[:, 0] if runs.index is None else tensor[:, 0].index_select(0, runs.index))
        for tensor in (key, value)
    )
    out = _varlen_attention()(
        *same_head_size(
            query[:, 0], key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        ),
        runs.queries,
        runs.keys,
        runs.longest_query,
        runs.longest_key,
        scale=form.scale,
        # how far a token sees back (-1: to the start) and ahead (0: causal, the last query at the last key)
        window_size=(-1 if form.window is None else form.window - 1, 0),
    )
    return out[:, None, :, :dv]


@cache
def _varlen_attention() -> Callable[..., Tensor] | None:
    """torch's variable-length attention, one kernel for all segments of a row; None if torch lacks it.

    Older versions, without scale and window, count as lacking.
    """
    try:  # here, since the import loads a compiler that CPU runs do not need
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if "scale" in takes and "window_size" in takes else None
