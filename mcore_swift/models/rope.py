"""Rotary position embedding (arXiv:2104.09864) with positions that restart at every sample of a packed row.

megatron-core's own module knows packed rows only through per-layer loops over the samples, and reads a bound on
the sample length that equals the row length as "positions do not restart". This one looks the angles up by
position once a microbatch, and every layer uses them as if the row were one sequence.
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
"""Tables of angles that are kept. Dynamic NTK scaling has one for every length of a text."""


class Rotary(nn.Module):
    """Takes the place of megatron-core's RotaryEmbedding in a GPTModel: same two calls, positions by lookup.

    kinds: the rotary embeddings of the model, of which every layer uses one. interleaved: whether the dimensions that
    turn together are neighbours (0 and 1, 2 and 3, ...) or half the width apart.
    """

    def __init__(
        self, kinds: Sequence[Frequencies], device: torch.device, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.device = device
        self.interleaved = interleaved
        # No buffers: a checkpoint does not hold them.
        self._tables: dict[tuple[int, int], Tensor] = {}
        self.lengths: list[int] | None = None
        """Of the samples of rows that are not packed, where angles depend on it; None: as long as the row."""

    @property
    def scale(self) -> float:
        """What cosine and sine of the first kind are multiplied by."""
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
        """What `forward` needs to know of this microbatch: this rank's tokens of each row, or how it is packed."""
        if isinstance(packed_seq_params, Packing):
            return packed_seq_params
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        length = hidden.size(0)
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length

    def forward(self, rows: int | Segments | Packing, offset: int = 0, **_: Any) -> Tensor:
        """Angles of each token of this rank, by its place in its segment: `[s, 1, kinds, dim]`, or
        `[s, b, kinds, dim]` with `lengths`. rows: tokens of this rank's part of one segment, or which it has."""
        if isinstance(rows, int):
            rows = part_of_one_segment(rows, self.device)
        return torch.cat([self._rows(kind, rows) for kind in range(len(self.kinds))], dim=2)

    def _rows(self, kind: int, rows: Segments | Packing) -> Tensor:
        regime, is_packed = self.kinds[kind].regime, isinstance(rows, Packing)
        segments = rows.segments if is_packed else rows
        if is_packed and rows.qkv_format == "thd":
            # Transformer Engine cuts the row into its samples, and those among ranks, itself.
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
        """Angles of the first positions of a sample, `[size, 1, 1, dim]`."""
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
