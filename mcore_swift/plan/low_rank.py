"""Low-rank adapters in the planner: their parameters, and the memory of the frozen matrices.

Counts adapters on every matrix of attention, MLPs and experts (--target_modules all-linear), with an A and a B for
each Hugging Face weight; fewer targets need less. See `tuners/lora.py` for the parts that each rank holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .layout import Layout
from .shape import ModelShape

BITS_BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale; scales that share one of their own with double quantization (QLoRA, arXiv:2305.14314)."""


@dataclass(frozen=True)
class LowRank:
    """Adapters of a given rank beside frozen weights.

    matrix_bytes: bytes per frozen weight in the decoder's linear layers; None: the same as for other weights.
    """

    rank: int
    matrix_bytes: float | None = None


def four_bit_bytes(double: bool) -> float:
    """Bytes per 4-bit weight including scales, which are fp32, or (`double`) 8-bit with an fp32 scale per 256."""
    scale = 1 + 4 / SCALES_BLOCK if double else 4
    return 0.5 + scale / BITS_BLOCK


@dataclass(frozen=True)
class Matrix:
    """A weight `[rows, columns]`. split: the dimension that tensor parallelism divides, 'rows', 'columns' or None.

    count: number of such matrices in the layer. expert: they belong to routed experts, divided by expert parallelism.
    """

    rows: int
    columns: int
    split: str | None
    count: int = 1
    expert: bool = False

    def held(self, layout: Layout) -> float:
        """Elements of all `count` matrices that a rank holds."""
        size, copies = self._shares(layout)
        return self.rows * self.columns * copies / (1 if self.split is None else size)

    def adapters(self, layout: Layout, rank: int) -> float:
        """Elements of the A `[rank, columns]` and B `[rows, rank]` of all `count` matrices that a process holds.

        Only one of A and B is divided.
        """
        size, copies = self._shares(layout)
        rows = self.rows / (size if self.split == "rows" else 1)
        columns = self.columns / (size if self.split == "columns" else 1)
        return rank * (rows + columns) * copies

    def _shares(self, layout: Layout) -> tuple[int, float]:
        """(ranks that a matrix is divided over, matrices per rank)."""
        return (layout.etp, self.count / layout.ep) if self.expert else (layout.tp, self.count)


def matrices(shape: ModelShape, index: int) -> Iterator[Matrix]:
    """The matrices of layer `index` that get adapters."""
    h = shape.hidden_size
    yield from _latent(shape) if shape.is_mla else _projections(shape)
    yield Matrix(h, shape.num_heads * shape.value_dim, "columns")
    if not shape.is_moe_layer(index):
        yield from _mlp(h, shape.ffn_hidden_size, shape.gated)
        return
    if not shape.expert_bias:  # gpt-oss keeps its experts in one tensor, which gets no adapter
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
