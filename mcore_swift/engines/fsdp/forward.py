"""From a batch to the negative log-likelihood of its labels, by any causal language model of transformers.

Rows with several samples end to end go to the model in the form it can take:

* flash attention gets the row and where its samples begin (varlen);
* a model whose masks follow position ids that start anew gets the row as it is;
* any other gets the samples as rows of their own, padded on the right, which a causal model cannot see.

Which of the latter two is cheaper is decided for each row; whether a model's masks do follow is tried out once.
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
"""Rows of their own are taken while padding makes them at most this much longer than the packed row."""


@dataclass(frozen=True)
class Rows:
    """What a model is given, and which of its outputs count.

    input_ids, position_ids: int64 `[n, length]`. learnt: int64 `[k]`, the positions with a loss in those rows laid
    end to end; places: int64 `[k]`, the same in the batch's rows laid end to end. extra: varlen arguments.
    """

    input_ids: Tensor
    position_ids: Tensor
    learnt: Tensor
    places: Tensor
    extra: dict[str, Any]


class Forward:
    """Calls one model with the arguments it knows."""

    def __init__(self, model: nn.Module, attention: str, parallel: SequenceParallel | None = None) -> None:
        """parallel: the processes that share rows, if this one does."""
        self.model = model
        self._parallel = parallel
        self._is_proved = parallel is None
        self.is_varlen = attention.startswith("flash")
        self._accepts = set(inspect.signature(inspect.unwrap(_causal_lm(model).forward)).parameters)
        self._masks_follow_positions: bool | None = None

    def token_nll(self, batch: Batch) -> Tensor:
        """-log p(labels[t] | tokens up to t), 0 where nothing is learnt: fp32 `[b, s]`. batch: on the host."""
        device = get_accelerator().device
        rows = self._rows(batch)
        labels = batch.labels.reshape(-1)[rows.places].to(device, non_blocking=True)
        logits = self._logits_at(rows, device)
        nll = nll_of_logits(logits, labels)
        places = rows.places.to(device, non_blocking=True)
        whole = torch.zeros(batch.labels.numel(), dtype=nll.dtype, device=device)
        return whole.index_put((places,), nll).view(batch.labels.shape)

    def own_part(self, batch: Batch) -> Batch:
        """What this process computes of a batch: its part of the tokens where rows are shared, else all of it."""
        return batch if self._parallel is None else self._parallel.begin(batch)

    def is_unsettled(self, batches: Sequence[Batch]) -> bool:
        """Whether something has to be found out about the model before these batches."""
        if self._parallel is not None:
            return not self._is_proved
        is_packed = any(batch.cu_seqlens is not None for batch in batches)
        return is_packed and self._masks_follow_positions is None and not self.is_varlen

    def settle(self) -> None:
        """Find out whether the model's masks follow position ids, or whether its rows can be shared. Collective.

        Raises UserError if they are to be shared and cannot.
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
        """Whether a second sample in a row comes out as it does alone, whatever the first one is."""
        device, mode = get_accelerator().device, self.model.training
        self.model.eval()
        first, other, second = ([2, 3, 5, 4], [4, 2, 3, 1], [3, 1, 4, 2])
        pairs = torch.tensor([first + second, other + second], device=device)
        positions = torch.arange(4, device=device).repeat(1, 2)
        alone = self._call(pairs[:1, 4:], position_ids=positions[:, :4])
        both = [self._call(row[None], position_ids=positions)[:, 4:] for row in pairs]
        self.model.train(mode)
        # Attention that crosses changes whole digits; arithmetic in another order only the last ones.
        limit = (1e-4 if alone.dtype is torch.float32 else 3e-2) * alone.float().abs().max()
        return all(bool((packed.float() - alone.float()).abs().max() <= limit) for packed in both)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch as an objective takes it."""
    names = ("input_ids", "labels", "loss_mask", "position_ids")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def unpacked(batch: Batch, learnt: Tensor) -> Rows:
    """The samples of a row `[1, s]` as rows of their own, `[n, longest]`, padded with token 0 on the right."""
    edges = batch.cu_seqlens[: _samples(batch) + 1].long()
    starts, lengths = edges[:-1], edges.diff()
    count, longest = len(lengths), int(lengths.max())
    offsets = torch.arange(longest).expand(count, longest)
    sources = (starts[:, None] + offsets).clamp(max=batch.input_ids.numel() - 1)
    input_ids = batch.input_ids[0][sources].masked_fill(offsets >= lengths[:, None], 0)
    sample = torch.searchsorted(edges, learnt, right=True) - 1
    return Rows(input_ids, offsets, sample * longest + learnt - starts[sample], learnt, {})


def _samples(batch: Batch) -> int:
    """Segments of a row that are samples; padding at its end is one more, and needs no forward pass."""
    return max(1, batch.num_samples)


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside adapters."""
    get: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    return get() if get is not None else model
