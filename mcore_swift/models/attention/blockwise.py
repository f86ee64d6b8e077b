"""Blockwise attention in plain torch, for what torch's fused kernels cannot express, in bounded memory.

The softmax runs online over blocks of keys (Milakov and Gimelshein, arXiv:1805.02867); the backward pass recomputes
each block's scores with the log-sum-exp of its rows (FlashAttention, arXiv:2205.14135, algorithm 4). Neither holds
the scores of more than one block at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 256, 512
_MASKED = -1e30  # finite, so that a row with nothing visible in its first block does not become NaN


@dataclass(frozen=True)
class Form:
    """How scores become weights.

    scale: factor of q k^T. window: keys a query sees, itself included; None: all up to itself. softcap: scores s
    become softcap * tanh(s / softcap) (arXiv:2408.00118). dropout: probability that a weight is dropped.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, form: Form, sinks: Tensor | None = None
) -> Tensor:
    """query `[b, heads, n, dk]`, key `[b, groups, m, dk]`, value `[b, groups, m, dv]` -> `[b, heads, n, dv]`.

    Causal: query i sees keys up to number m - n + i, so the queries are the last n of m positions. sinks: `[heads]`,
    a logit of each head that takes part in the softmax and carries no value. Computed in fp32 (fp64 for fp64).
    """
    return _Blockwise.apply(query, key, value, sinks, form)


class _Blockwise(torch.autograd.Function):
    """Queries that share a key head are rows of one matrix, so keys and values are never repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, form: Form
    ) -> Tensor:
        blocks = _Blocks(query, key, form, _seed(form, query.device))
        out = query.new_empty(*query.shape[:3], value.size(-1))
        lse = torch.empty(query.shape[:3], dtype=blocks.dtype, device=query.device)
        for rows, columns in blocks.of_queries():
            q = blocks.rows(query, rows)
            largest, total = blocks.start(q, sinks, rows)
            mixed = torch.zeros((), dtype=blocks.dtype, device=query.device)
            for cols in columns:
                scores, _ = blocks.scores(q, key, rows, cols)
                highest = torch.maximum(largest, scores.amax(-1, keepdim=True))
                weights, shrink = (scores - highest).exp_(), (largest - highest).exp_()
                total = total * shrink + weights.sum(-1, keepdim=True)
                kept = blocks.keep(weights, rows, cols)
                mixed = mixed * shrink + (weights if kept is None else weights * kept) @ blocks.part(
                    value, cols
                )
                largest = highest
            out[:, :, rows] = blocks.heads(mixed / total).to(out.dtype)
            lse[:, :, rows] = blocks.heads(largest + total.log()).squeeze(-1)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.form, ctx.seed = form, blocks.seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        blocks = _Blocks(query, key, ctx.form, ctx.seed)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros(t.shape, dtype=blocks.dtype, device=t.device) for t in (key, value))
        # For the softmax's gradient: for each row, the gradient of the weights, averaged with the weights.
        mean = (grad.to(blocks.dtype) * out).sum(-1)
        for rows, columns in blocks.of_queries():
            q, g = blocks.rows(query, rows), blocks.rows(grad, rows)
            row_lse, row_mean = (blocks.rows(t[..., None], rows) for t in (lse, mean))
            d_q = torch.zeros_like(q)
            for cols in columns:
                scores, slope = blocks.scores(q, key, rows, cols, with_slope=True)
                weights = (scores - row_lse).exp_()
                d_weights = g @ blocks.part(value, cols).transpose(-1, -2)
                kept = blocks.keep(weights, rows, cols)
                if kept is not None:
                    d_weights *= kept
                d_value[:, :, cols] += (weights if kept is None else weights * kept).transpose(-1, -2) @ g
                d_scores = weights * (d_weights - row_mean) * ctx.form.scale
                if slope is not None:
                    d_scores *= slope
                d_q += d_scores @ blocks.part(key, cols)
                d_key[:, :, cols] += d_scores.transpose(-1, -2) @ q
            d_query[:, :, rows] = blocks.heads(d_q).to(d_query.dtype)
        d_sinks = None
        if sinks is not None:
            d_sinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * mean).sum((0, 2)).to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None


class _Blocks:
    """Cuts queries and keys into blocks and computes the scores of one.

    Internally, the query heads that share a key head are concatenated: `[b, groups, heads / groups * rows, d]`.
    """

    def __init__(self, query: Tensor, key: Tensor, form: Form, seed: int) -> None:
        self.form, self.seed = form, seed
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.n, self.m, self.groups = query.size(2), key.size(2), key.size(1)
        self.shared = query.size(1) // self.groups  # query heads per key head

    def of_queries(self) -> Iterator[tuple[slice, list[slice]]]:
        """Each block of queries with the blocks of keys that any of its rows sees."""
        for start in range(0, self.n, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, self.n)
            last = self.m - self.n + stop
            first = 0 if self.form.window is None else max(0, self.m - self.n + start + 1 - self.form.window)
            yield (
                slice(start, stop),
                [slice(at, min(at + KEY_BLOCK, last)) for at in range(first, last, KEY_BLOCK)],
            )

    def rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """`[b, heads, n, d]` -> these rows, `[b, groups, heads / groups * rows, d]`."""
        part = tensor[:, :, rows].to(self.dtype)
        return part.reshape(part.size(0), self.groups, -1, part.size(-1))

    def heads(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return rows.view(rows.size(0), self.groups * self.shared, -1, rows.size(-1))

    def part(self, tensor: Tensor, cols: slice) -> Tensor:
        return tensor[:, :, cols].to(self.dtype)

    def start(self, q: Tensor, sinks: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
        """Largest logit and sum of exponentials before the first key: the sink's, or -inf and 0 without sinks."""
        shape = (*q.shape[:3], 1)
        if sinks is None:
            return q.new_full(shape, float("-inf")), q.new_zeros(shape)
        each = sinks.detach().to(self.dtype).repeat_interleave(rows.stop - rows.start)
        return each.view(1, self.groups, -1, 1).expand(shape), q.new_ones(shape)

    def scores(
        self, q: Tensor, key: Tensor, rows: slice, cols: slice, *, with_slope: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[b, groups, heads / groups * rows, cols]`, and if asked for the derivative of their soft-capping."""
        scores = (q @ self.part(key, cols).transpose(-1, -2)).mul_(self.form.scale)
        slope = None
        if self.form.softcap is not None:
            scores.div_(self.form.softcap).tanh_()
            slope = 1 - scores.square() if with_slope else None
            scores.mul_(self.form.softcap)
        hidden = self._hidden(rows, cols, q.device)
        if hidden is not None:
            by_row = scores.view(q.size(0), -1, rows.stop - rows.start, cols.stop - cols.start)
            by_row.masked_fill_(hidden, _MASKED)
        return scores, slope

    def _hidden(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        """bool `[rows, cols]`: keys after the query or before its window; None if all are seen."""
        shift, window = self.m - self.n, self.form.window
        first, last = rows.start + shift, rows.stop - 1 + shift
        if cols.stop - 1 <= first and (window is None or cols.start > last - window):
            return None
        behind = (
            torch.arange(first, last + 1, device=device)[:, None]
            - torch.arange(cols.start, cols.stop, device=device)[None, :]
        )
        hidden = behind < 0
        return hidden if window is None else hidden.logical_or_(behind >= window)

    def keep(self, weights: Tensor, rows: slice, cols: slice) -> Tensor | None:
        """Dropout's factors on the weights of a block, the same in the forward and the backward pass."""
        if not self.form.dropout:
            return None
        generator = torch.Generator(weights.device)
        generator.manual_seed((self.seed + rows.start * 1_000_003 + cols.start) % 2**63)
        drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
        return (drawn >= self.form.dropout).to(self.dtype).div_(1 - self.form.dropout)


def _seed(form: Form, device: torch.device) -> int:
    """A seed for dropout, drawn from the current generator; 0 without dropout."""
    return int(torch.randint(2**62, (), device=device).item()) if form.dropout else 0
