"""How several samples lie in one row, in the form every layer of the model takes it."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Packing(PackedSeqParams):
    """A row of samples one after the other, each attending only to itself.

    lengths: tokens of each segment of the row, in order; the last one may be padding.
    position_ids: int64 `[s]`, place of each token in its own segment.

    It travels as megatron-core's PackedSeqParams. `qkv_format` is "sbhd" for our own attention and rotary
    embedding, which read `lengths` and `position_ids`, and "thd" for Transformer Engine's.
    """

    lengths: list[int] = field(default_factory=list)
    position_ids: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device, *, thd: bool) -> "Packing":
        """cu_seqlens: int32 `[segments + 1]` on the host, from 0 to the length of the row."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        on_device = cu_seqlens.to(device, non_blocking=True)
        return cls(
            qkv_format="thd" if thd else "sbhd",
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
            position_ids=positions.to(device, non_blocking=True),
        )
