"""The input of a forward pass: the tensors of one microbatch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .corpora import Store


@dataclass
class Batch:
    """One microbatch of b rows and s positions. With packing or padding-free, b == 1 and samples are end to end.

    input_ids    int64 [b, s]
    labels       int64 [b, s]   next-token ids, already shifted: labels[t] is the target of position t;
                                0 where loss_mask is 0
    loss_mask    float32 [b, s] how much the label counts: 1 or a weight; 0 on prompts, padding and the last
                                token of each sample
    position_ids int64 [b, s]   restart at 0 for each sample
    cu_seqlens   int32 [n + 1] or None: with b == 1, where each sample of the row starts; the last entry is s.
                                Padding after a sample, if its length must be a multiple, belongs to its
                                segment; padding at the end of the row is a segment of its own. None: every
                                row is one sample, padded on the right
    max_seqlen   length of the longest segment of cu_seqlens; None without cu_seqlens
    num_samples  real samples; num_tokens: real tokens, without padding
    padding      bool [b, s]    true at padding; None: unknown
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None
    num_samples: int
    num_tokens: int
    padding: torch.Tensor | None = None


class _Rows:
    """Arrays of a batch, filled sample by sample."""

    def __init__(self, b: int, s: int, pad: int) -> None:
        self.input_ids = np.full((b, s), pad, np.int64)
        self.labels = np.zeros((b, s), np.int64)
        self.loss_mask = np.zeros((b, s), np.float32)
        self.position_ids = np.zeros((b, s), np.int64)
        self.padding = np.ones((b, s), np.bool_)

    def put(self, row: int, at: int, store: Store, sample: int) -> int:
        """Write a sample from position `at`; returns where it ends."""
        ids, weights = store.ids(sample), store.weights(sample)
        end = at + len(ids)
        self.input_ids[row, at:end] = ids
        self.loss_mask[row, at : end - 1] = weights[1:]
        self.labels[row, at : end - 1] = np.where(weights[1:] != 0, ids[1:], 0)
        self.position_ids[row, at:end] = np.arange(len(ids))
        self.padding[row, at:end] = False
        return end

    def batch(self, cu_seqlens: list[int] | None, num_samples: int, num_tokens: int) -> Batch:
        edges = None if cu_seqlens is None else np.array(cu_seqlens, np.int32)
        return Batch(
            *(torch.from_numpy(x) for x in (self.input_ids, self.labels, self.loss_mask, self.position_ids)),
            cu_seqlens=None if edges is None else torch.from_numpy(edges),
            max_seqlen=None if edges is None else int(np.diff(edges).max()),
            num_samples=num_samples,
            num_tokens=num_tokens,
            padding=torch.from_numpy(self.padding),
        )


def end_to_end(store: Store, samples: Sequence[int], s: int, pad: int, multiple: int = 1) -> Batch:
    """One row [1, s] with `samples` end to end, the rest padding. Without samples, all of it is padding.

    multiple: each sample is padded to a multiple of it; it divides s.
    """
    rows, edges, tokens = _Rows(1, s, pad), [0], 0
    for sample in samples:
        start = edges[-1]
        end = rows.put(0, start, store, sample)
        tokens += end - start
        edges.append(padded_length(end, multiple))
        rows.position_ids[0, end : edges[-1]] = np.arange(end - start, edges[-1] - start)
    if edges[-1] < s:
        rows.position_ids[0, edges[-1] :] = np.arange(s - edges[-1])
        edges.append(s)
    return rows.batch(edges, len(samples), tokens)


def padded_length(length: Any, multiple: int) -> Any:
    """A length, or an array of lengths, rounded up to a multiple."""
    return -(-length // multiple) * multiple


def padded(store: Store, samples: Sequence[int], b: int, s: int, pad: int) -> Batch:
    """Rows [b, s], one sample each, padded on the right; rows beyond `samples` are all padding."""
    rows, tokens = _Rows(b, s, pad), 0
    rows.position_ids[:] = np.arange(s)
    for row, sample in enumerate(samples):
        tokens += rows.put(row, 0, store, sample)
    return rows.batch(None, len(samples), tokens)
