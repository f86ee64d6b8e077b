"""The core attention module of a layer: causal, grouped-query, packed, with windows, soft-capping and sinks.

Attention on a packed row runs segment by segment: block-diagonal attention that skips the masked blocks. `kernels.py`
chooses the kernel, and `exchange.py` has what context-parallel ranks exchange.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mcore_swift.models.attention.blockwise import Form
from mcore_swift.models.attention.exchange import gather_keys, share_heads, unite_heads
from mcore_swift.models.attention.kernels import attend_pieces
from mcore_swift.models.packing import Packing
from mcore_swift.models.segments import Segments, part_of_one_segment

CP_COMM_TYPES = ("all_gather", "a2a")
"""How context-parallel ranks can divide the work here; the first is the default."""


class CoreAttention(MegatronModule):
    """softmax(scale * q k^T) v, causal, with the interface of megatron-core's core attention modules.

    Under context parallelism a rank holds the queries, keys and values of its part of each segment (see `Segments`),
    and either gathers all keys and values ("all_gather") or computes a part of the heads for all tokens ("a2a").

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

        cp_comm_type: one of `CP_COMM_TYPES`. window: tokens that a token attends to, itself included; None: all
        before it. softcap: scores s become softcap * tanh(s / softcap). sinks: each head has a learnt logit that
        takes part in the softmax and carries no value (arXiv:2309.17453, as in gpt-oss). Raises ValueError for
        another cp_comm_type under context parallelism.
        """
        super().__init__(config=config)
        self.scale = (
            softmax_scale if softmax_scale is not None else (k_channels or config.kv_channels) ** -0.5
        )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window, self.softcap = window, softcap
        self.cp_comm_type = cp_comm_type or CP_COMM_TYPES[0]
        if config.context_parallel_size > 1 and self.cp_comm_type not in CP_COMM_TYPES:
            raise ValueError(f"CoreAttention exchanges by {' or '.join(CP_COMM_TYPES)}, not {cp_comm_type}")
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

        s: this context-parallel rank's tokens. Without a batch dimension, as multi-latent attention gives packed
        rows, b is 1. With a `Packing` (b == 1) each segment attends to itself alone. `attention_mask` is ignored:
        unpacked rows hold one sample each, padded on the right, and causality hides that padding.
        """
        if query.dim() == 3:
            query, key, value = query[:, None], key[:, None], value[:, None]
        segments = self._segments(query, packed_seq_params)
        form = Form(self.scale, self.window, self.softcap, self.dropout if self.training else 0.0)
        # Dropout differs between tensor-parallel ranks, which hold different heads.
        with get_cuda_rng_tracker().fork() if form.dropout else nullcontext():
            if segments.size == 1:
                out = attend_pieces(query, key, value, segments, form, self.softmax_offset)
            elif self.cp_comm_type == "a2a":
                out = self._by_heads(query, key, value, segments, form)
            else:
                group = parallel_state.get_context_parallel_group()
                keys, values = gather_keys(key, value, segments, group)
                out = attend_pieces(query, keys, values, segments, form, self.softmax_offset)
        return out.flatten(2)

    def _segments(self, query: Tensor, packed_seq_params: PackedSeqParams | None) -> Segments:
        if isinstance(packed_seq_params, Packing):
            return packed_seq_params.segments
        return part_of_one_segment(query.size(0), query.device)

    def _by_heads(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, form: Form) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        shared = share_heads(query, key, value, segments, group)
        sinks = None if self.softmax_offset is None else self.softmax_offset.chunk(group.size())[group.rank()]
        return unite_heads(attend_pieces(*shared, segments.whole, form, sinks), segments, group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The sinks, divided over tensor-parallel ranks; empty for a layer without sinks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets
        )
