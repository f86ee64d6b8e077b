"""Rotary position embedding (arXiv:2104.09864) with positions that restart at every sample of a packed row.

megatron-core's own module handles packed rows only by looping over the samples in every layer, and takes a maximum
sample length equal to the row length to mean that positions do not restart. This one looks the angles up by position
once per microbatch, and every layer uses them as if the row were one sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from mcore_swift.models.frequencies import Frequencies
from mcore_swift.models.packing import Packing
from mcore_swift.models.segments import Segments, part_of_one_segment

MOST_TABLES = 64
"""How many tables of angles are cached. Dynamic NTK scaling needs one for every text length."""


class Rotary(nn.Module):
    """Replaces megatron-core's RotaryEmbedding in a GPTModel: the same two methods, angles looked up by position.

    kinds: the rotary embeddings of the model; each layer uses one of them. interleaved: whether rotary pairs are
    adjacent dimensions (0 and 1, 2 and 3, ...) or half the width apart.
    """

    def __init__(
        self, kinds: Sequence[Frequencies], device: torch.device, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.device = device
        self.interleaved = interleaved
        # Not buffers: they do not belong in a checkpoint.
        self._tables: dict[tuple[int, int], Tensor] = {}
        self.lengths: list[int] | None = None
        """Sample lengths of unpacked rows, if angles depend on them; None: every sample is as long as its row."""

    @property
    def scale(self) -> float:
        """Factor on cosine and sine, of the first kind."""
        return self.kinds[0].attention_factor

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> int | Packing:
        """What `forward` needs to know about this microbatch: this rank's tokens per row, or its Packing."""
        if isinstance(packed_seq_params, Packing):
            return packed_seq_params
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = hidden.size(0)
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length

    def forward(self, rows: int | Segments | Packing, offset: int = 0, **_: Any) -> Tensor:
        """Angles of each of this rank's tokens by its position in its segment: `[s, 1, kinds, dim]`, or
        `[s, b, kinds, dim]` with `lengths`. rows: number of this rank's tokens of one segment, or the segments."""
        if isinstance(rows, int):
            rows = part_of_one_segment(rows, self.device)
        return torch.cat([self._rows(kind, rows) for kind in range(len(self.kinds))], dim=2)

    def _rows(self, kind: int, rows: Segments | Packing) -> Tensor:
        regime, is_packed = self.kinds[kind].regime, isinstance(rows, Packing)
        segments = rows.segments if is_packed else rows
        if is_packed and rows.qkv_format == "thd":
            # Transformer Engine itself splits the row into samples, and samples over ranks.
            return self._angles(kind, segments.longest, regime(segments.longest))
        if is_packed and self.kinds[kind].by_length:
            each = zip(segments.lengths, segments.tokens, strict=True)
            whole = torch.cat([self._angles(kind, length, regime(tokens)) for length, tokens in each])
            return whole if segments.size == 1 else whole[segments.held]
        texts = [segments.longest] if is_packed or not self.lengths else self.lengths
        table = torch.cat([self._angles(kind, segments.longest, regime(length)) for length in texts], dim=1)
        if segments.size == 1 and len(segments.lengths) == 1:
            return table
        return table[segments.positions]

    def _angles(self, kind: int, size: int, regime: int) -> Tensor:
        """Angles of the first `size` positions of a sample: fp32 `[size, 1, 1, dim]`."""
        key = kind, regime
        if key not in self._tables or self._tables[key].size(0) < size:
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            positions = torch.arange(size, device=self.device, dtype=torch.float32)
            angles = torch.outer(positions, self.kinds[kind].at(regime).to(self.device))
            pairs = (angles, angles)
            both = torch.stack(pairs, dim=-1).flatten(-2) if self.interleaved else torch.cat(pairs, dim=-1)
            self._tables[key] = both[:, None, None, :]
        return self._tables[key][:size]
