"""Rotary position embedding (arXiv:2104.09864) with positions that restart at every sample of a packed row.

megatron-core's own module knows packed rows only through per-layer loops over the samples, and reads a bound on
the sample length that equals the row length as "positions do not restart". This one looks the angles up by
position once a microbatch, and every layer uses them as if the row were one sequence.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from mcore_swift.models.packing import Packing


class Rotary(nn.Module):
    """Takes the place of megatron-core's RotaryEmbedding in a GPTModel: same two calls, positions by lookup."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.inv_freq = inv_freq  # an attribute and no buffer: a checkpoint does not hold it
        self._table = torch.empty(0)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> "int | Packing":
        """What `forward` needs to know of this microbatch: its length, or how it is packed."""
        if isinstance(packed_seq_params, Packing):
            return packed_seq_params
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = hidden.size(0)
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length

    def forward(self, rows: "int | Packing", offset: int = 0, **_: Any) -> Tensor:
        """Angles `[s, 1, 1, head_dim]` of each token: by its place in the row, or in its sample if packed."""
        if isinstance(rows, Packing):
            table = self._angles(rows.longest)
            # Transformer Engine cuts the row into its samples itself.
            return table if rows.qkv_format == "thd" else table[rows.position_ids]
        return self._angles(rows + offset)[offset:]

    def _angles(self, length: int) -> Tensor:
        if self._table.size(0) < length:
            positions = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
            angles = torch.outer(positions, self.inv_freq)
            self._table = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        return self._table[:length]
