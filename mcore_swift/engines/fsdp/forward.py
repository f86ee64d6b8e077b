"""From a batch to the negative log-likelihood of its labels, by any causal language model of transformers.

A packed row is passed to the model in the form that it supports:

* flash attention gets the row and the boundaries of its samples (varlen);
* a model whose masks separate samples where position ids restart gets the row as it is;
* any other model gets the samples as separate rows, padded on the right, which causal attention does not see.

For models of the second kind, the cheaper of the last two is chosen for each row. Which kind a model is of is tested
once, before the first packed batch.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.engines.fsdp.sequence_parallel import SequenceParallel, prove
from mcore_swift.engines.fsdp.token_nll import nll_of_logits

_WORTH_UNPACKING = 1.25
"""Samples are passed as separate rows as long as these have at most this many times the tokens of the packed row."""


@dataclass(frozen=True)
class Rows:
    """The input of a model, and the positions of its output that have a loss.

    input_ids, position_ids: int64 `[n, length]`. learnt: int64 `[k]`, positions with a loss in the flattened input_ids;
    places: int64 `[k]`, the same positions in the flattened batch. extra: varlen arguments.
    """

    input_ids: Tensor
    position_ids: Tensor
    learnt: Tensor
    places: Tensor
    extra: dict[str, Any]


class Forward:
    """Calls one model with the arguments that its forward method accepts."""

    def __init__(self, model: nn.Module, attention: str, parallel: SequenceParallel | None = None) -> None:
        """parallel: the processes that share rows, if this one does."""
        self.model = model
        self._parallel = parallel
        self._is_proved = parallel is None
        self.is_varlen = attention.startswith("flash")
        self._accepts = set(inspect.signature(inspect.unwrap(_causal_lm(model).forward)).parameters)
        self._masks_follow_positions: bool | None = None

    def token_nll(self, batch: Batch) -> Tensor:
        """-log p(labels[t] | tokens up to t), and 0 at positions without a loss: fp32 `[b, s]`. batch: on the host."""
        device = get_accelerator().device
        rows = self._rows(batch)
        labels = batch.labels.reshape(-1)[rows.places].to(device, non_blocking=True)
        logits = self._logits_at(rows, device)
        nll = nll_of_logits(logits, labels)
        places = rows.places.to(device, non_blocking=True)
        whole = torch.zeros(batch.labels.numel(), dtype=nll.dtype, device=device)
        return whole.index_put((places,), nll).view(batch.labels.shape)

    def own_part(self, batch: Batch) -> Batch:
        """This process's part of the batch with sequence parallelism, else the whole batch."""
        return batch if self._parallel is None else self._parallel.begin(batch)

    def is_unsettled(self, batches: Sequence[Batch]) -> bool:
        """Whether `settle` has to be called before these batches."""
        if self._parallel is not None:
            return not self._is_proved
        is_packed = any(batch.cu_seqlens is not None for batch in batches)
        return is_packed and self._masks_follow_positions is None and not self.is_varlen

    def settle(self) -> None:
        """Test whether the model's masks follow position ids, or whether it supports sequence parallelism. Collective.

        Raises UserError if sequence parallelism is asked for and the model does not support it.
        """
        if self._parallel is not None:
            prove(self._parallel, self.model, _causal_lm(self.model), self._call)
            self._is_proved = True
            return
        self._masks_follow_positions = "position_ids" in self._accepts and self._follows_positions()

    def _rows(self, batch: Batch) -> Rows:
        learnt = batch.loss_mask.reshape(-1).nonzero().squeeze(-1)
        if batch.cu_seqlens is None:
            return Rows(batch.input_ids, batch.position_ids, learnt, learnt, {})
        if self.is_varlen:
            edges = batch.cu_seqlens.to(get_accelerator().device, non_blocking=True)
            extra = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
            extra |= {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
            return Rows(batch.input_ids, batch.position_ids, learnt, learnt, extra)
        count, total = _samples(batch), batch.input_ids.numel()
        longest = int(batch.cu_seqlens[: count + 1].diff().max())
        if self._masks_follow_positions and count * longest > _WORTH_UNPACKING * total:
            return Rows(batch.input_ids, batch.position_ids, learnt, learnt, {})
        return unpacked(batch, learnt)

    def _logits_at(self, rows: Rows, device: torch.device) -> Tensor:
        """Logits `[k, vocabulary]` at the learnt positions."""
        n, length = rows.input_ids.shape
        columns = (rows.learnt % length).unique() if len(rows.learnt) else rows.learnt.new_zeros(1)
        place = rows.learnt // length * len(columns) + torch.searchsorted(columns, rows.learnt % length)
        arguments = dict(rows.extra)
        if "position_ids" in self._accepts:
            arguments["position_ids"] = rows.position_ids.to(device, non_blocking=True)
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = columns.to(device, non_blocking=True)
        else:
            place = rows.learnt
        logits = self._call(rows.input_ids.to(device, non_blocking=True), **arguments)
        flat = logits.reshape(-1, logits.size(-1))
        if len(place) == len(flat) and n == 1:
            return flat
        return flat.index_select(0, place.to(device, non_blocking=True))

    def _call(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        if "use_cache" in self._accepts:
            arguments["use_cache"] = False
        return self.model(input_ids=input_ids, **arguments).logits

    @torch.no_grad()
    def _follows_positions(self) -> bool:
        """Whether the logits of the second sample in a packed row are those of the sample alone."""
        device, mode = get_accelerator().device, self.model.training
        self.model.eval()
        first, other, second = ([2, 3, 5, 4], [4, 2, 3, 1], [3, 1, 4, 2])
        pairs = torch.tensor([first + second, other + second], device=device)
        positions = torch.arange(4, device=device).repeat(1, 2)
        alone = self._call(pairs[:1, 4:], position_ids=positions[:, :4])
        both = [self._call(row[None], position_ids=positions)[:, 4:] for row in pairs]
        self.model.train(mode)
        # Attention across samples changes the leading digits; another order of summation only the last ones.
        limit = (1e-4 if alone.dtype is torch.float32 else 3e-2) * alone.float().abs().max()
        return all(bool((packed.float() - alone.float()).abs().max() <= limit) for packed in both)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with the tensors that objectives use on the device."""
    names = ("input_ids", "labels", "loss_mask", "position_ids")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def unpacked(batch: Batch, learnt: Tensor) -> Rows:
    """The samples of a packed row `[1, s]` as separate rows, `[n, longest]`, padded with token 0 on the right."""
    edges = batch.cu_seqlens[: _samples(batch) + 1].long()
    starts, lengths = edges[:-1], edges.diff()
    count, longest = len(lengths), int(lengths.max())
    offsets = torch.arange(longest).expand(count, longest)
    sources = (starts[:, None] + offsets).clamp(max=batch.input_ids.numel() - 1)
    input_ids = batch.input_ids[0][sources].masked_fill(offsets >= lengths[:, None], 0)
    sample = torch.searchsorted(edges, learnt, right=True) - 1
    return Rows(input_ids, offsets, sample * longest + learnt - starts[sample], learnt, {})


def _samples(batch: Batch) -> int:
    """Number of samples in a row, without the segment of padding at its end, which needs no forward pass."""
    return max(1, batch.num_samples)


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside adapters."""
    get: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    return get() if get is not None else model
