"""Floating-point operations of a model, for TFLOP/s and MFU.

Counted is the arithmetic that the model's definition asks for, as in the two papers that the field's numbers
go back to: a multiply-add is two operations; the backward pass costs twice the forward pass; recomputed
activations do not count (MFU, not HFU: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B); attention
scores are counted for the full square of the sequence, the causal half not taken off (same place, and
Narayanan et al., arXiv:2104.04473, appendix). Norms, softmax, rotary positions and look-ups are left out,
there and here.

    forward(batch) = 2 * M * sum(s_i) + 2 * (K + V) * sum over layers of pairs(s_i)

s_i are the lengths of the sequences that attend within themselves: with block-diagonal packing the
samples, not the row. M are the weights each token is multiplied with (`count.matmul_parameters`:
grouped key/value heads, the three matrices of a gated MLP, the two of a plain one, of routed experts those that
a token sees, router and shared experts, the projections of latent attention in their training form, where keys and
values are made for every head, the output embedding). K = heads * head_dim is the width of the scores'
product Q K^T, V = heads * value_dim that of the weighted sum of values. pairs(s) = s^2, and where a window w
is shorter than s, twice the causal pairs that it leaves: 2 w s - w^2.

A layer of multi-token prediction (arXiv:2412.19437, section 2.2) counts as a decoder layer, the projection
of 2 h to h and the output embedding once more.

NVIDIA's published TFLOP/s count the causal half (pairs = s^2 / 2): less by a few per cent at the same speed.
"""

from collections.abc import Iterable
from functools import lru_cache

from .count import matmul_parameters, mtp_matmuls
from .shape import ModelShape

BACKWARD_TO_FORWARD = 2


def forward_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of the forward pass over sequences of these lengths (real tokens, padding left out)."""
    return sum(_linear(shape) * length + attention_flops(shape, length) for length in sequence_lengths)


def training_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of forward and backward pass over sequences of these lengths, without recomputation."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops(shape, sequence_lengths)


def forward_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """The same from sums over a batch.

    tokens: sum(s_i); squares: sum(s_i^2). An int where both are. Layers with a window count as if all
    sequences had the length squares / tokens that the average token sees.
    """
    full, windows = _windows(shape)
    pairs = full * squares
    for window, layers in windows:
        length = squares / tokens if tokens else 0
        pairs += layers * (_pairs(length, window) * (tokens / length) if length > window else squares)
    return _linear(shape) * tokens + 2 * _score_width(shape) * pairs


def training_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """Forward and backward pass, from sums over a batch as in `forward_flops_of_sums`."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops_of_sums(shape, tokens, squares)


def flops_per_token(shape: ModelShape, sequence_length: float, *, trains: bool = True) -> float:
    """Training FLOPs of one token where all sequences have `sequence_length` tokens.

    trains: else all weights are frozen, whose gradients are a third of the work, as the log of a run counts it.

    For sequences of several lengths give sum(s_i^2) / sum(s_i), the length that the average token sees.
    """
    return training_flops_of_sums(shape, 1, sequence_length) * (1 if trains else 2 / 3)


def attention_flops(shape: ModelShape, length: int) -> int:
    """Forward FLOPs of scores and weighted sums of one sequence in all layers, the full square counted."""
    full, windows = _windows(shape)
    pairs = full * length * length + sum(layers * _pairs(length, window) for window, layers in windows)
    return 2 * _score_width(shape) * pairs


def attention_flops_of_layer(shape: ModelShape, index: int, length: int) -> float:
    """The same of one layer."""
    return 2 * _score_width(shape) * _pairs(length, shape.window(index) or length)


def _pairs(length: float, window: int) -> float:
    return length * length if length <= window else 2 * window * length - window * window


def _score_width(shape: ModelShape) -> int:
    return shape.query_size + shape.num_heads * shape.value_dim


@lru_cache(maxsize=32)
def _linear(shape: ModelShape) -> int:
    """Forward FLOPs of a token in linear layers and embeddings."""
    return 2 * (matmul_parameters(shape) + shape.num_mtp_layers * mtp_matmuls(shape))


@lru_cache(maxsize=32)
def _windows(shape: ModelShape) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(layers that see the whole sequence, (window, layers with it) ...), layers of MTP included."""
    found = [shape.window(index) for index in range(shape.num_layers + shape.num_mtp_layers)]
    windows = sorted({window for window in found if window})
    return found.count(None), tuple((window, found.count(window)) for window in windows)
