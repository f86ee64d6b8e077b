"""Core attention for machines without Transformer Engine: causal, grouped-query, packed, sliding window.

Works on torch's scaled_dot_product_attention, which has a blockwise kernel on CPU and on CUDA, so no S x S matrix
and no S x S mask is ever made. A packed row is attended segment by segment, which is block-diagonal attention
without the blocks that would be masked.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from mcore_swift.models.packing import Packing


class CoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v, causal, with the interface of megatron-core's core attention modules."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        window: int | None = None,
    ) -> None:
        """window: tokens that a token attends to, itself included; None: all before it."""
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("CoreAttention does not attend across context-parallel ranks")
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query `[s, b, heads, d]`, key and value `[s, b, groups, d]` -> `[s, b, heads * d]`.

        With a `Packing` (b == 1) each segment attends to itself alone. `attention_mask` is not read: rows
        without a packing are one sample each, padded on the right, which causality keeps out of sight.
        """
        s, b, heads, d = query.shape
        if isinstance(packed_seq_params, Packing):
            out = self._packed(query[:, 0], key[:, 0], value[:, 0], packed_seq_params)[:, None]
        else:
            out = self._causal(*(t.permute(1, 2, 0, 3) for t in (query, key, value))).permute(2, 0, 1, 3)
        return out.reshape(s, b, heads * d)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """query `[s, heads, d]`, key and value `[s, groups, d]` -> `[s, heads, d]`."""
        if query.is_cuda and self._fits_varlen(query):
            repeat = query.size(1) // key.size(1)
            return _varlen_attention()(
                query,
                key.repeat_interleave(repeat, dim=1),
                value.repeat_interleave(repeat, dim=1),
                packing.cu_seqlens_q,
                packing.cu_seqlens_kv,
                packing.longest,
                packing.longest,
                scale=self.softmax_scale,
                window_size=(-1, 0),  # all before, none after: causal
            )
        segments = zip(*(t.split(packing.lengths) for t in (query, key, value)), strict=True)
        out = [
            self._causal(*(t.transpose(0, 1)[None] for t in segment))[0].transpose(0, 1)
            for segment in segments
        ]
        return torch.cat(out)

    def _fits_varlen(self, query: Tensor) -> bool:
        fits_kernel = query.dtype in (torch.bfloat16, torch.float16) and query.size(-1) % 8 == 0
        return fits_kernel and not self.window and not self._dropout_now and _varlen_attention() is not None

    @property
    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query `[b, heads, s, d]`, key and value `[b, groups, s, d]` -> `[b, heads, s, d]`."""
        s = query.size(2)
        if self.window is None or s <= self.window:
            return self._attend(query, key, value, is_causal=True)
        # In blocks of a window's length, so that a block's queries see at most two windows of keys.
        out = []
        for start in range(0, s, self.window):
            stop, first = min(start + self.window, s), max(0, start - self.window + 1)
            distance = (
                torch.arange(start, stop, device=query.device)[:, None]
                - torch.arange(first, stop, device=query.device)[None, :]
            )
            visible = (distance >= 0) & (distance < self.window)
            out.append(
                self._attend(
                    query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], attn_mask=visible
                )
            )
        return torch.cat(out, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        # Dropout differs between tensor-parallel ranks, which hold different heads.
        with get_cuda_rng_tracker().fork() if self._dropout_now else nullcontext():
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=self._dropout_now,
                scale=self.softmax_scale,
                enable_gqa=key.size(1) != query.size(1),
                **mask,
            )


@cache
def _varlen_attention() -> Callable[..., Tensor] | None:
    """torch's attention over segments of a row, one kernel for all of them; None where torch has none such.

    A form of it without scale and window, as older torch has, counts as none.
    """
    try:  # here, since the import brings a compiler that a CPU run can spare
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if "scale" in takes and "window_size" in takes else None
