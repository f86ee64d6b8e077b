"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values come from a narrow latent.

megatron-core's module builds the projections; what happens between them is written out here, for three reasons. Its
rotary embedding handles packed rows only by looping over the samples in every layer. With column-parallel down
projections (the case without Transformer Engine) or without sequence parallelism, its gradient of the shared rotary key
misses the heads of the other tensor-parallel ranks. And in transformers, norms of the latents have a separate epsilon.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from mcore_swift.models.layer import Latent
from mcore_swift.models.packing import Packing


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention, with rotary angles looked up by position and correct gradients in every layout.

    `build_model` gives it the model's Rotary as `rotary_pos_emb`.
    """

    def __init__(self, *args: Any, latent: Latent, **kwargs: Any) -> None:
        if not isinstance(multi_latent_attention.TELinear, type):
            # megatron-core 0.16 assumes Transformer Engine is there whenever its own wrapper can be imported
            multi_latent_attention.HAVE_TE = False
        super().__init__(*args, **kwargs)
        self.latent = latent
        self.kv_layernorm.eps = latent.norm_eps
        if self.config.q_lora_rank is not None:
            self.q_layernorm.eps = latent.norm_eps

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The spec's modules, unchanged. (megatron-core >= 0.19 would ask for fused norms without q-lora.)"""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden_states `[s, b, h]`, or `[s / TP, b, h]` with sequence parallelism -> query, key, value, latents.

        query and key `[s, b, heads / TP, qk_head_dim + qk_pos_emb_head_dim]`, value `[..., v_head_dim]`; without
        `b` when Transformer Engine attends to a packed row. latents: the query's, then that of key and value.
        """
        config = self.config
        if config.q_lora_rank is None:
            q_latent = hidden_states
        else:
            q_latent, _ = self._down(self.linear_q_down_proj, hidden_states, config.q_lora_rank, 0)
            q_latent = self.q_layernorm(q_latent)
        kv_latent, k_rot = self._down(
            self.linear_kv_down_proj, hidden_states, config.kv_lora_rank, config.qk_pos_emb_head_dim
        )
        kv_latent = self.kv_layernorm(kv_latent)
        packed = isinstance(packed_seq_params, Packing)
        angles = self.rotary_pos_emb(packed_seq_params.segments if packed else k_rot.size(0))
        if self.recompute_up_proj:
            self.qkv_up_checkpoint = CheckpointWithoutOutput()
            query, key, value = self.qkv_up_checkpoint.checkpoint(
                self._up, q_latent, kv_latent, k_rot, angles
            )
        else:
            query, key, value = self._up(q_latent, kv_latent, k_rot, angles)
        if packed and packed_seq_params.qkv_format == "thd":
            query, key, value = (t.squeeze(1) for t in (query, key, value))
        return query, key, value, q_latent, kv_latent

    def _down(self, linear: nn.Module, x: Tensor, rank: int, shared: int) -> tuple[Tensor, Tensor]:
        """The latent `[..., rank]` of the tokens of `x`, and the `[..., shared]` that all heads use, of all tokens.

        A linear layer whose output is split over tensor-parallel ranks returns all tokens; one that every rank
        holds whole (Transformer Engine's) returns the tokens of `x`.
        """
        out, _ = linear(x)
        cut = out.size(-1) != rank + shared
        if cut:
            out = gather_from_tensor_model_parallel_region(out)
        latent, common = out.split([rank, shared], dim=-1)
        if cut and self.config.sequence_parallel:
            latent = scatter_to_sequence_parallel_region(latent)
        if not cut and self.config.sequence_parallel:
            common = gather_from_sequence_parallel_region(common, tensor_parallel_output_grad=True)
        else:  # each rank's heads contribute to its gradient
            common = copy_to_tensor_model_parallel_region(common)
        return latent, common

    def _up(
        self, q_latent: Tensor, kv_latent: Tensor, k_rot: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents -> query, key and value of this rank's heads, the rotary part rotated by `angles` `[s, 1, 1, d]`."""
        config, heads = self.config, self.num_attention_heads_per_partition
        up = self.linear_q_proj if config.q_lora_rank is None else self.linear_q_up_proj
        query, _ = up(q_latent)
        query = query.view(*query.shape[:2], heads, self.q_head_dim)
        kv, _ = self.linear_kv_up_proj(kv_latent)
        kv = kv.view(*kv.shape[:2], heads, config.qk_head_dim + config.v_head_dim)
        q_plain, q_rot = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        k_plain, value = kv.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        scale = self.rotary_pos_emb.scale
        cos, sin = ((f(angles) * scale).to(query.dtype).chunk(2, dim=-1)[0] for f in (torch.cos, torch.sin))
        k_rot = self._turn(k_rot[:, :, None], cos, sin).expand(-1, -1, heads, -1)
        query = torch.cat((q_plain, self._turn(q_rot, cos, sin)), dim=-1)
        return query, torch.cat((k_plain, k_rot), dim=-1), value.contiguous()

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate each pair of dimensions of x `[s, b, heads, d]` by its angle; cos and sin `[s, 1, 1, d / 2]`.

        The result has the first halves of all pairs, then the second ones. Scores do not change, since query and key
        have the same order.
        """
        first, second = (x[..., ::2], x[..., 1::2]) if self.latent.interleaved else x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
