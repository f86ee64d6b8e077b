"""A flat range of a tensor is cut into rectangles that cover it exactly, in order."""

import random

import pytest
import torch

from mcore_swift.engines.megatron.optimizer_state import rectangles

SHAPES = [(7,), (1,), (4, 5), (1, 6), (6, 1), (3, 4, 5), (2, 1, 3), (2, 3, 2, 4), ()]


def ranges(shape):
    """Every range of a small tensor."""
    size = torch.Size(shape).numel()
    return [(start, stop) for start in range(size + 1) for stop in range(start, size + 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rectangles_cover_each_range_exactly(shape):
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    chosen = ranges(shape)
    for start, stop in random.Random(0).sample(chosen, min(400, len(chosen))):
        pieces = []
        for region, first, size in rectangles(shape, start, stop):
            piece = values[tuple(slice(a, b) for a, b in region)].reshape(-1)
            assert piece.numel() == size and int(piece[0]) == first
            pieces.append(piece)
        found = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)
        assert found.tolist() == list(range(start, stop))
        assert len(pieces) <= max(1, 2 * len(shape) - 1)


def test_an_empty_range_has_none():
    assert not list(rectangles((4, 5), 7, 7))
    assert not list(rectangles((4, 5), 9, 7))
