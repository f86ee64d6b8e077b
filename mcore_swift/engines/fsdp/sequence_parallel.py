"""Sequence parallelism for transformers models (Ulysses, arXiv:2309.14509).

A group of N processes has the same rows; rank r computes the r-th of N equal parts of each. Only attention needs the
other tokens: an all-to-all gives each process all tokens for 1/N of the heads, and a second one returns the output.
This is an attention function that transformers calls by name, so that models need no change.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.engines.fsdp.rope_lengths import depends_on_length
from mcore_swift.errors import UserError
from mcore_swift.models.collectives import AllToAll

NAME = "ulysses"
"""Name of this attention function in transformers' registry."""
_BY_TOKEN = ("input_ids", "labels", "loss_mask", "position_ids", "padding")
_KINDS = {"full_attention", "sliding_attention", "attention"}
_BEYOND_US = {"s_aux": "sinks", "position_bias": "a bias by position"}


class SequenceParallel:
    """The group of processes that share rows, and the segments of the batch they are at.

    base: the attention on whole rows: sdpa, or a flash attention.
    """

    def __init__(self, group: dist.ProcessGroup, base: str) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.base = base
        self._is_whole = False
        self._edges: list[int] | None = None
        self._varlen: dict[str, Any] = {}

    def begin(self, batch: Batch) -> Batch:
        """This rank's part of a batch, `[b, s / N]`. Until the next call, attention uses the segments of this batch.

        That includes the backward pass, which may recompute layers.
        """
        self.enter(None if batch.cu_seqlens is None else batch.cu_seqlens.tolist())
        length = batch.input_ids.size(1) // self.size
        mine = slice(self.rank * length, (self.rank + 1) * length)
        parts = {
            name: getattr(batch, name)[:, mine] for name in _BY_TOKEN if getattr(batch, name) is not None
        }
        return replace(batch, **parts, cu_seqlens=None, max_seqlen=None)

    def enter(self, edges: list[int] | None, *, is_whole: bool = False) -> None:
        """From now on, attention is within segments bounded by `edges` (None: each row is one segment).

        is_whole: every rank has all tokens and all heads, as without sequence parallelism.
        """
        global _active
        _active = self
        self._edges, self._is_whole, self._varlen = edges, is_whole, {}
        if edges is not None and self.base.startswith("flash"):
            lengths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
            cumulative = torch.tensor(edges, dtype=torch.int32, device=get_accelerator().device)
            for side in ("q", "k"):
                self._varlen |= {f"cu_seq_lens_{side}": cumulative, f"max_length_{side}": max(lengths)}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        dropout: float,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query, key, value: `[b, heads, s / N, d]` -> `[b, s / N, heads, d]`."""
        shared = not self._is_whole
        if shared:
            query, key, value = self._share_heads(query, key, value)
        if self.base.startswith("flash"):
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            options = {"dropout": dropout, "scaling": scaling, "sliding_window": window, "softcap": softcap}
            flash = ALL_ATTENTION_FUNCTIONS[self.base]
            out, _ = flash(module, query, key, value, None, **options, **self._varlen)
        else:
            parts = [
                _causal(query[:, :, piece], key[:, :, piece], value[:, :, piece], dropout, scaling, window)
                for piece in self._segments(query.size(2))
            ]
            out = torch.cat(parts, dim=2).transpose(1, 2)
        return self._unite_heads(out) if shared else out

    def _segments(self, length: int) -> Iterator[slice]:
        """Segments are attended to one by one: a mask for the row would have `length` squared entries."""
        edges = self._edges or [0, length]
        return (slice(start, end) for start, end in zip(edges, edges[1:], strict=False))

    def _share_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`[b, heads, s / N, d]` each -> `[b, heads / N, s, d]`; key heads are repeated until N divides them."""
        parts = []
        for tensor in tensors:
            repeat = math.lcm(tensor.size(1), self.size) // tensor.size(1)
            tensor = tensor.repeat_interleave(repeat, dim=1) if repeat > 1 else tensor
            # [N, b, s / N, heads / N, d], so that one message carries all three
            parts.append(tensor.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4))
        message = torch.cat([part.flatten(3) for part in parts], dim=-1)
        row = AllToAll.apply(message, self.group).movedim(0, 1).flatten(1, 2)
        whole = row.split([part.shape[3:].numel() for part in parts], dim=-1)
        pairs = zip(whole, parts, strict=True)
        return tuple(one.unflatten(-1, part.shape[3:]).transpose(1, 2) for one, part in pairs)

    def _unite_heads(self, out: Tensor) -> Tensor:
        """`[b, s, heads / N, d]` -> `[b, s / N, heads, d]`."""
        message = out.unflatten(1, (self.size, -1)).movedim(1, 0)
        return AllToAll.apply(message, self.group).movedim(0, 2).flatten(2, 3)


_active: SequenceParallel | None = None


def register() -> None:
    """Register the attention function in transformers as `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. attention_mask: None; masks are made here, from the segments."""
    asked = [what for name, what in _BEYOND_US.items() if others.get(name) is not None]
    is_flash = _active.base.startswith("flash")
    if softcap is not None and not is_flash:
        asked.append("soft-capped scores")
    if asked:
        raise UserError(
            f"--sequence_parallel_size: this model's attention has {' and '.join(asked)}, which is not supported",
            "leave --sequence_parallel_size at 1, or use `megatron sft` with --context_parallel_size",
        )
    options = {"dropout": dropout, "scaling": scaling, "window": sliding_window, "softcap": softcap}
    return _active.attend(module, query, key, value, **options), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention within one segment, `[b, heads, n, d]`; with a window, over the last `window` tokens only."""
    n, mask = query.size(2), None
    if window and n > window:
        place = torch.arange(n, device=query.device)
        behind = place[:, None] - place
        mask = (behind >= 0) & (behind < window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.size(1) != key.size(1),
    )


def check_kinds(config: Any) -> None:
    """Raise UserError for a model with layers other than full or sliding-window causal attention."""
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if getattr(config, "attention_chunk_size", None):
        kinds.add("chunked_attention")
    if depends_on_length(config):
        raise UserError(
            f"--sequence_parallel_size: the rotary angles of this {config.model_type} depend on the length of a text, "
            "of which each process sees its part",
            "leave --sequence_parallel_size at 1, or use `megatron sft` with --context_parallel_size",
        )
    if kinds:
        raise UserError(
            f"--sequence_parallel_size does not support the layers of {config.model_type}: {', '.join(sorted(kinds))}",
            "leave --sequence_parallel_size at 1",
        )


@torch.no_grad()
def prove(parallel: SequenceParallel, base: Any, call: Any) -> None:
    """Check that the model has the same logits with sequence parallelism as without. Collective.

    base: the transformers model, in evaluation mode. call: (input_ids, **arguments) -> logits. Raises UserError if not.
    """
    device = get_accelerator().device
    length = 6 * parallel.size
    ids = 2 + torch.arange(length, device=device)[None] % 5
    positions = torch.arange(length, device=device)[None]
    edges = [0, 2 * parallel.size + 1, length]
    packed = torch.cat([positions[:, : edges[1]], positions[:, : length - edges[1]]], dim=1)
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:
        base.set_attn_implementation("eager")
    try:
        alone = call(ids)
    finally:
        base.set_attn_implementation(NAME)
    parallel.enter(None, is_whole=True)
    ours = call(ids, position_ids=positions)
    parallel.enter(edges, is_whole=True)
    row = call(ids, position_ids=packed)
    mine = slice(parallel.rank * 6, (parallel.rank + 1) * 6)
    parallel.enter(edges)
    part = call(ids[:, mine], position_ids=packed[:, mine])
    pairs = ((ours, alone), (part, row[:, mine]), (row[:, : edges[1]], alone[:, : edges[1]]))
    # Attention that misses tokens changes the leading digits; another order of summation only the last ones.
    limit = (1e-4 if alone.dtype is torch.float32 else 3e-2) * alone.float().abs().max()
    wrong = [bool((one.float() - other.float()).abs().max() > limit) for one, other in pairs]
    told = torch.tensor(float(any(wrong)), device=device)
    dist.all_reduce(told)
    if told > 0:
        raise UserError(
            f"--sequence_parallel_size: {base.config.model_type} gives other results with shared rows",
            "leave --sequence_parallel_size at 1, or use `megatron sft` with --context_parallel_size",
        )
