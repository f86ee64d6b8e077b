"""The core attention module of a layer: causal, grouped-query, packed, with windows, soft-capping and sinks.

A packed row is attended segment by segment, which is block-diagonal attention without the blocks that would be
masked. Which kernel does it: `kernels.py`.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mcore_swift.models.attention.blockwise import Form
from mcore_swift.models.attention.kernels import attend, same_head_size
from mcore_swift.models.packing import Packing


class CoreAttention(MegatronModule):
    """softmax(scale * q k^T) v, causal, with the interface of megatron-core's core attention modules.

    softmax_offset: `[heads / TP]`, the sink logit of each head, where the layer has sinks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        """softmax_scale: 1 / sqrt(k_channels) if not given. k_channels, v_channels: of a head; for the scale only.

        window: tokens that a token attends to, itself included; None: all before it. softcap: scores s become
        softcap * tanh(s / softcap). sinks: each head has a learnt logit that takes part in the softmax and carries
        no value (arXiv:2309.17453, as in gpt-oss).
        """
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("CoreAttention does not attend across context-parallel ranks")
        self.scale = (
            softmax_scale if softmax_scale is not None else (k_channels or config.kv_channels) ** -0.5
        )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window, self.softcap = window, softcap
        self.softmax_offset: nn.Parameter | None = None
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

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
        """query `[s, b, heads, dk]`, key `[s, b, groups, dk]`, value `[s, b, groups, dv]` -> `[s, b, heads * dv]`.

        Without a batch dimension, as multi-latent attention gives packed rows, b is 1. With a `Packing` (b == 1)
        each segment attends to itself alone. `attention_mask` is not read: rows without a packing are one sample
        each, padded on the right, which causality keeps out of sight.
        """
        if query.dim() == 3:
            query, key, value = query[:, None], key[:, None], value[:, None]
        packing = packed_seq_params if isinstance(packed_seq_params, Packing) else None
        # Dropout differs between tensor-parallel ranks, which hold different heads.
        with get_cuda_rng_tracker().fork() if self._form.dropout else nullcontext():
            if packing is not None and self._fits_varlen(query):
                out = self._varlen(query, key, value, packing)
            else:
                lengths = packing.lengths if packing is not None else [query.size(0)]
                out = self._by_segment(query, key, value, lengths)
        return out.flatten(2)

    @property
    def _form(self) -> Form:
        return Form(self.scale, self.window, self.softcap, self.dropout if self.training else 0.0)

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """`[s, b, heads or groups, d]` -> `[s, b, heads, dv]`: each segment attends to itself."""
        segments = zip(
            *(tensor.permute(1, 2, 0, 3).split(lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
        out = [attend(*segment, self._form, self.softmax_offset) for segment in segments]
        return (out[0] if len(out) == 1 else torch.cat(out, dim=2)).permute(2, 0, 1, 3)

    def _fits_varlen(self, query: Tensor) -> bool:
        """Whether torch's kernel over the segments of a row can do it: for CUDA in half precision."""
        plain = self.softcap is None and self.softmax_offset is None and not self._form.dropout
        fits_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        return plain and fits_kernel and query.size(-1) % 8 == 0 and _varlen_attention() is not None

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """`[s, 1, heads or groups, d]` -> `[s, 1, heads, dv]`."""
        repeat, dv = query.size(2) // key.size(2), value.size(-1)
        out = _varlen_attention()(
            *same_head_size(
                query[:, 0],
                key[:, 0].repeat_interleave(repeat, dim=1),
                value[:, 0].repeat_interleave(repeat, dim=1),
            ),
            packing.cu_seqlens_q,
            packing.cu_seqlens_kv,
            packing.longest,
            packing.longest,
            scale=self.scale,
            # how far a token sees back (-1: to the start) and ahead (0: causal)
            window_size=(-1 if self.window is None else self.window - 1, 0),
        )
        return out[:, None, :, :dv]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The sinks, divided over tensor-parallel ranks; nothing for a layer without."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets
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
