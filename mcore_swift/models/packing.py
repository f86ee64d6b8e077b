"""How samples are packed into one row, in the form that every layer of the model takes."""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_swift.models.segments import Segments


@dataclass
class Packing(PackedSeqParams):
    """A row of consecutive samples, each attending only to itself.

    It is passed through the model as megatron-core's PackedSeqParams. `qkv_format` is "sbhd" for our own attention
    and rotary embedding, which read `segments`, and "thd" for Transformer Engine's.
    """

    segments: Segments | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment of the whole row, in order; the last one may be padding."""
        return self.segments.lengths

    @property
    def longest(self) -> int:
        return self.segments.longest

    @property
    def position_ids(self) -> Tensor:
        """Position of each of this rank's tokens in its own segment: int64 `[s / CP]`."""
        return self.segments.positions

    @classmethod
    def of(cls, cu_seqlens: Tensor, segments: Segments, *, thd: bool) -> "Packing":
        """cu_seqlens: int32 `[segments + 1]` on the host, from 0 to the length of the row.

        Padding that makes a sample's length divisible is part of the sample's segment: no real token sees it.
        """
        edges = cu_seqlens.to(segments.device, non_blocking=True)
        return cls(
            qkv_format="thd" if thd else "sbhd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            max_seqlen_q=segments.longest,
            max_seqlen_kv=segments.longest,
            segments=segments,
        )
