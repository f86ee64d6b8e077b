"""Floating-point operations of a model, for TFLOP/s and MFU.

This counts the arithmetic that the model's definition requires, with the usual conventions: a multiply-add is two
operations; the backward pass costs twice the forward pass; recomputed activations do not count (MFU, not HFU:
Chowdhery et al., PaLM, arXiv:2204.02311, appendix B); attention scores count for the full square of the sequence,
without halving for the causal mask (same appendix, and Narayanan et al., arXiv:2104.04473, appendix). Like both
papers, it leaves out norms, softmax, rotary positions and look-ups.

    forward(batch) = 2 * M * sum(s_i) + 2 * (K + V) * sum over layers of pairs(s_i)

s_i are the lengths of the sequences that attend within themselves: with block-diagonal packing, those of the samples,
not of the row. M is the number of weights that each token is multiplied by (`count.matmul_parameters`): attention
with its grouped key/value heads, the two matrices of an MLP or three of a gated one, the router, the shared experts
and the routed experts that a token is sent to, and the output embedding. Latent attention counts in its training
form, which computes keys and values for every head. K = heads * head_dim is the width of the product Q K^T,
V = heads * value_dim that of the weighted sum of values. pairs(s) = s^2; where a window w is shorter than s, it is
twice the causal pairs within the window: 2 w s - w^2.

A multi-token-prediction layer (arXiv:2412.19437, section 2.2) counts as a decoder layer, the projection
from 2 h to h, and the output embedding once more.

NVIDIA's published TFLOP/s count only the causal half (pairs = s^2 / 2): a few per cent less at the same speed.
"""

from collections.abc import Iterable
from functools import lru_cache

from .count import matmul_parameters, mtp_matmuls
from .shape import ModelShape

BACKWARD_TO_FORWARD = 2


def forward_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of the forward pass over sequences of these lengths, in real tokens without padding."""
    return sum(_linear(shape) * length + attention_flops(shape, length) for length in sequence_lengths)


def training_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of forward and backward pass over sequences of these lengths, without recomputation."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops(shape, sequence_lengths)


def forward_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """FLOPs of the forward pass, from sums over a batch.

    tokens: sum(s_i); squares: sum(s_i^2). The result is an int if both are. Layers with a window are counted as if
    all sequences had the length squares / tokens, which is what the average token sees.
    """
    full, windows = _windows(shape)
    pairs = full * squares
    for window, layers in windows:
        length = squares / tokens if tokens else 0
        pairs += layers * (_pairs(length, window) * (tokens / length) if length > window else squares)
    return _linear(shape) * tokens + 2 * _score_width(shape) * pairs


def training_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """FLOPs of forward and backward pass, from sums over a batch as in `forward_flops_of_sums`."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops_of_sums(shape, tokens, squares)


def flops_per_token(shape: ModelShape, sequence_length: float, *, trains: bool = True) -> float:
    """Training FLOPs per token if all sequences have `sequence_length` tokens.

    trains: False if all weights are frozen, which saves their gradients, a third of the work; as in a run's log.

    For sequences of different lengths, pass sum(s_i^2) / sum(s_i), the length that the average token sees.
    """
    return training_flops_of_sums(shape, 1, sequence_length) * (1 if trains else 2 / 3)


def attention_flops(shape: ModelShape, length: int) -> int:
    """Forward FLOPs of one sequence's scores and weighted sums in all layers, for the full square."""
    full, windows = _windows(shape)
    pairs = full * length * length + sum(layers * _pairs(length, window) for window, layers in windows)
    return 2 * _score_width(shape) * pairs


def attention_flops_of_layer(shape: ModelShape, index: int, length: int) -> float:
    """Like `attention_flops`, for one layer."""
    return 2 * _score_width(shape) * _pairs(length, shape.window(index) or length)


def _pairs(length: float, window: int) -> float:
    return length * length if length <= window else 2 * window * length - window * window


def _score_width(shape: ModelShape) -> int:
    return shape.query_size + shape.num_heads * shape.value_dim


@lru_cache(maxsize=32)
def _linear(shape: ModelShape) -> int:
    """Forward FLOPs per token in linear layers and embeddings."""
    return 2 * (matmul_parameters(shape) + shape.num_mtp_layers * mtp_matmuls(shape))


@lru_cache(maxsize=32)
def _windows(shape: ModelShape) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(number of layers without a window, ((window, number of layers with it), ...)); includes MTP layers."""
    found = [shape.window(index) for index in range(shape.num_layers + shape.num_mtp_layers)]
    windows = sorted({window for window in found if window})
    return found.count(None), tuple((window, found.count(window)) for window in windows)
