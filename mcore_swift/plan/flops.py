"""Floating-point operations of a dense model, for TFLOP/s and MFU.

Counted is the arithmetic that the model's definition asks for, as in the two papers that the field's numbers
go back to: a multiply-add is two operations; the backward pass costs twice the forward pass; recomputed
activations do not count (MFU, not HFU: Chowdhery et al., PaLM, arXiv:2204.02311, appendix B); attention
scores are counted for the full square of the sequence, the causal half not taken off (same place, and
Narayanan et al., arXiv:2104.04473, appendix). Norms, softmax, rotary positions and look-ups are left out,
there and here.

    forward(batch) = 2 * M * sum(s_i) + 4 * L * A * sum(s_i^2)

s_i are the lengths of the sequences that attend within themselves: with block-diagonal packing the
samples, not the row. M are the weights each token is multiplied with (`ModelShape.matmul_parameters`:
grouped key/value heads, the three matrices of the gated MLP, the output embedding), L the layers,
A = heads * head_dim. Per layer, the scores Q K^T and the weighted sum of values take 2 s^2 A each.
"""

from collections.abc import Iterable

from .shape import ModelShape

BACKWARD_TO_FORWARD = 2


def forward_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of the forward pass over sequences of these lengths (real tokens, padding left out)."""
    tokens = squares = 0
    for length in sequence_lengths:
        tokens += length
        squares += length * length
    return forward_flops_of_sums(shape, tokens, squares)


def training_flops(shape: ModelShape, sequence_lengths: Iterable[int]) -> int:
    """FLOPs of forward and backward pass over sequences of these lengths, without recomputation."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops(shape, sequence_lengths)


def forward_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """The same from sums over a batch.

    tokens: sum(s_i); squares: sum(s_i^2). An int where both are.
    """
    attention = 4 * shape.num_layers * shape.query_size
    return 2 * shape.matmul_parameters * tokens + attention * squares


def training_flops_of_sums(shape: ModelShape, tokens: float, squares: float) -> float:
    """Forward and backward pass, from sums over a batch as in `forward_flops_of_sums`."""
    return (1 + BACKWARD_TO_FORWARD) * forward_flops_of_sums(shape, tokens, squares)


def flops_per_token(shape: ModelShape, sequence_length: float) -> float:
    """Training FLOPs of one token where all sequences have `sequence_length` tokens.

    For sequences of several lengths give sum(s_i^2) / sum(s_i), the length that the average token sees.
    """
    return training_flops_of_sums(shape, 1, sequence_length)
