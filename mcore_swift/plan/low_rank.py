"""Low-rank adapters in the planner: their parameters, and what the frozen matrices beside them take.

Counted are adapters on every matrix of attention, MLPs and experts (--target_modules all-linear), A and B of each
Hugging Face weight; fewer targets take less. See `tuners/lora.py` for what each rank holds of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .layout import Layout
from .shape import ModelShape

BITS_BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale; scales that share one of their own with double quantization (QLoRA, arXiv:2305.14314)."""


@dataclass(frozen=True)
class LowRank:
    """Adapters of a rank beside frozen weights. matrix_bytes: of one frozen weight of a linear layer in the decoder;
    None: as all weights."""

    rank: int
    matrix_bytes: float | None = None


def four_bit_bytes(double: bool) -> float:
    """Bytes of a weight in 4 bits with its scales: fp32 each, or 8 bits with fp32 for each 256 of them (`double`)."""
    scale = 1 + 4 / SCALES_BLOCK if double else 4
    return 0.5 + scale / BITS_BLOCK


@dataclass(frozen=True)
class Matrix:
    """A weight `[rows, columns]`. split: what tensor parallelism divides, 'rows', 'columns' or nothing (None).

    count: how many such there are in the layer. expert: of routed experts, which expert parallelism divides.
    """

    rows: int
    columns: int
    split: str | None
    count: int = 1
    expert: bool = False

    def held(self, layout: Layout) -> float:
        """Elements on a rank, of all `count`."""
        size, copies = self._shares(layout)
        return self.rows * self.columns * copies / (1 if self.split is None else size)

    def adapters(self, layout: Layout, rank: int) -> float:
        """Elements of A `[rank, columns]` and B `[rows, rank]` on a rank, of all `count`: one of both is divided."""
        size, copies = self._shares(layout)
        rows = self.rows / (size if self.split == "rows" else 1)
        columns = self.columns / (size if self.split == "columns" else 1)
        return rank * (rows + columns) * copies

    def _shares(self, layout: Layout) -> tuple[int, float]:
        """(ranks that a matrix is divided over, matrices on a rank)."""
        return (layout.etp, self.count / layout.ep) if self.expert else (layout.tp, self.count)


def matrices(shape: ModelShape, index: int) -> Iterator[Matrix]:
    """Those of layer `index` that adapters are put on."""
    h = shape.hidden_size
    yield from _latent(shape) if shape.is_mla else _projections(shape)
    yield Matrix(h, shape.num_heads * shape.value_dim, "columns")
    if not shape.is_moe_layer(index):
        yield from _mlp(h, shape.ffn_hidden_size, shape.gated)
        return
    if not shape.expert_bias:  # gpt-oss: its experts are in one tensor, in which no adapter is
        yield from _mlp(h, shape.moe_ffn_hidden_size, True, count=shape.num_experts, expert=True)
    if shape.shared_ffn_hidden_size:
        yield from _mlp(h, shape.shared_ffn_hidden_size, True)


def _projections(shape: ModelShape) -> Iterator[Matrix]:
    yield Matrix(shape.query_size, shape.hidden_size, "rows")
    yield Matrix(shape.kv_size, shape.hidden_size, "rows", count=2)


def _latent(shape: ModelShape) -> Iterator[Matrix]:
    h, rank = shape.hidden_size, shape.kv_lora_rank or 0
    if shape.q_lora_rank is None:
        yield Matrix(shape.query_size, h, "rows")
    else:
        yield Matrix(shape.q_lora_rank, h, None)
        yield Matrix(shape.query_size, shape.q_lora_rank, "rows")
    yield Matrix(rank + shape.qk_rope_head_dim, h, None)
    yield Matrix(shape.num_heads * (shape.qk_nope_head_dim + shape.value_dim), rank, "rows")


def _mlp(h: int, width: int, gated: bool, count: int = 1, expert: bool = False) -> Iterator[Matrix]:
    yield Matrix(width, h, "rows", (1 + gated) * count, expert)
    yield Matrix(h, width, "columns", count, expert)
