"""From a batch to the negative log-likelihood of its labels, by any causal language model of transformers.

A packed row is passed to the model in the form that it supports:

* flash attention gets the row and the boundaries of its samples (varlen);
* a model that separates samples where position ids restart gets the row as it is;
* any other model gets the samples as separate rows, padded on the right, which causal attention does not see. With
  LongRoPE, short and long samples are two batches.

For models of the second kind, the cheaper of the last two is chosen for each row. Whether a model is causal and
separates samples is tested with a few tokens before the first step.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.engines.fsdp.sequence_parallel import SequenceParallel, prove
from mcore_swift.engines.fsdp.token_nll import nll_of_logits
from mcore_swift.errors import UserError

_WORTH_UNPACKING = 1.25
"""Samples are passed as separate rows as long as these have at most this many times the tokens of the packed row."""


@dataclass(frozen=True)
class Rows:
    """The input of a model, and the positions of its output that have a loss.

    input_ids: int64 `[n, length]`. position_ids: the same, or None where the model's own are right: rows that are one
    sample each. (They need not begin at 0: RoBERTa's begin after the id of the padding token.)
    learnt: int64 `[k]`, positions with a loss in the flattened input_ids; places: int64 `[k]`, the same positions in
    the flattened batch. extra: varlen arguments.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    learnt: Tensor
    places: Tensor
    extra: dict[str, Any]


class Forward:
    """Calls one model with the arguments that its forward method accepts."""

    def __init__(
        self,
        model: nn.Module,
        attention: str,
        parallel: SequenceParallel | None = None,
        length_limit: int | None = None,
    ) -> None:
        """parallel: the processes that share rows, if this one does.

        length_limit: samples longer than this are computed in a batch of their own.
        """
        self.model = model
        self._parallel = parallel
        self._is_proved = parallel is None
        self.is_varlen = attention.startswith("flash")
        self._accepts = set(inspect.signature(inspect.unwrap(_causal_lm(model).forward)).parameters)
        self._length_limit = length_limit
        self._row_limit = _row_limit(model)
        self._is_causal = False
        self._keeps_apart: bool | None = None

    def token_nll(self, batch: Batch) -> Tensor:
        """-log p(labels[t] | tokens up to t), and 0 at positions without a loss: fp32 `[b, s]`. batch: on the host."""
        device = get_accelerator().device
        whole = torch.zeros(batch.labels.numel(), dtype=torch.float32, device=device)
        for rows in self._rows(batch):
            labels = batch.labels.reshape(-1)[rows.places].to(device, non_blocking=True)
            nll = nll_of_logits(self._logits_at(rows, device), labels)
            whole = whole.index_put((rows.places.to(device, non_blocking=True),), nll)
        return whole.view(batch.labels.shape)

    def own_part(self, batch: Batch) -> Batch:
        """This process's part of the batch with sequence parallelism, else the whole batch."""
        return batch if self._parallel is None else self._parallel.begin(batch)

    def is_unsettled(self, batches: Sequence[Batch]) -> bool:
        """Whether `settle` has to be called before these batches."""
        if self._parallel is not None:
            return not self._is_proved
        is_packed = any(batch.cu_seqlens is not None for batch in batches)
        return not self._is_causal or (is_packed and self._keeps_apart is None)

    def settle(self, batches: Sequence[Batch]) -> None:
        """Test whether the model is causal and separates packed samples, or supports sequence parallelism. Collective.

        Raises UserError if it is not causal, or if sequence parallelism is asked for and the model does not support it.
        """
        mode = self.model.training
        self.model.eval()
        try:
            if self._parallel is not None:
                prove(self._parallel, _causal_lm(self.model), self._call)
                self._is_proved = True
                return
            if not self._is_causal:
                self._check_causal()
                self._is_causal = True
            if self._keeps_apart is None and any(batch.cu_seqlens is not None for batch in batches):
                self._keeps_apart = self._samples_stay_apart()
        finally:
            self.model.train(mode)

    def _rows(self, batch: Batch) -> list[Rows]:
        """The inputs of the model for a batch: as many calls on every process, since each gathers weights."""
        learnt = batch.loss_mask.reshape(-1).nonzero().squeeze(-1)
        if self._length_limit is not None:
            return self._by_length(batch, learnt)
        if batch.cu_seqlens is None:
            positions = None if self._parallel is None else batch.position_ids
            return [Rows(batch.input_ids, positions, learnt, learnt, {})]
        if self.is_varlen and self._keeps_apart:
            extra = _varlen(batch.cu_seqlens, batch.max_seqlen)
            return [Rows(batch.input_ids, batch.position_ids, learnt, learnt, extra)]
        starts, lengths = samples_of(batch)
        total = batch.input_ids.numel()
        is_short = len(lengths) * int(lengths.max()) <= _WORTH_UNPACKING * total
        if self._keeps_apart and not is_short and total <= self._row_limit:
            return [Rows(batch.input_ids, batch.position_ids, learnt, learnt, {})]
        return [unpacked(batch, learnt, starts, lengths)]

    def _by_length(self, batch: Batch, learnt: Tensor) -> list[Rows]:
        """The samples up to the length limit, and the longer ones."""
        starts, lengths = samples_of(batch)
        found = []
        for chosen in (lengths <= self._length_limit, lengths > self._length_limit):
            if chosen.any():
                found.append(unpacked(batch, learnt, starts[chosen], lengths[chosen]))
            elif (
                dist.is_initialized() and dist.get_world_size() > 1
            ):  # others may have some, and gather weights
                nothing = learnt[:0]
                found.append(Rows(batch.input_ids[:1, :1], None, nothing, nothing, {}))
        return found

    def _logits_at(self, rows: Rows, device: torch.device) -> Tensor:
        """Logits `[k, vocabulary]` at the learnt positions."""
        n, length = rows.input_ids.shape
        columns = (rows.learnt % length).unique() if len(rows.learnt) else rows.learnt.new_zeros(1)
        place = rows.learnt // length * len(columns) + torch.searchsorted(columns, rows.learnt % length)
        arguments = dict(rows.extra)
        if rows.position_ids is not None:
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
    def _check_causal(self) -> None:
        """Raise UserError if logits depend on later tokens, which are the labels."""
        a, b, c, d, e = _tokens(_causal_lm(self.model).config)
        rows = torch.tensor([[a, b, c, d], [a, b, c, e]], device=get_accelerator().device)
        one, other = self._call(rows)[:, :3]
        if _differ(one, other):
            config = _causal_lm(self.model).config
            switch = next((n for n in ("is_decoder", "causal") if getattr(config, n, None) is False), None)
            raise UserError(
                f"this {config.model_type} is not causal: its logits depend on the tokens that they predict",
                f'set "{switch}": true in its config.json' if switch else "give a text-generating model",
            )

    @torch.no_grad()
    def _samples_stay_apart(self) -> bool:
        """Whether the logits of the second sample in a packed row are those of the sample alone.

        Recurrent layers may remember little of the first sample, and chunks of a row are longer than the test: such
        models are taken not to separate samples.
        """
        base = _causal_lm(self.model)
        kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
        if getattr(base, "_is_stateful", False) or "chunked_attention" in kinds:
            return False
        if "position_ids" not in self._accepts:
            return False
        device = get_accelerator().device
        a, b, c, d, e = _tokens(base.config)
        first, other, second = ([b, c, e, d], [d, b, c, a], [c, a, d, b])
        pairs = torch.tensor([first + second, other + second], device=device)
        arguments: dict[str, Any] = {"position_ids": torch.arange(4, device=device).repeat(1, 2)}
        if self.is_varlen:
            arguments |= _varlen(torch.tensor([0, 4, 8], dtype=torch.int32), 4)
        alone = self._call(pairs[:1, 4:])
        return not any(_differ(self._call(row[None], **arguments)[:, 4:], alone) for row in pairs)


def _tokens(config: Any) -> list[int]:
    """Five tokens to test a model with. Padding tokens are none of them: some models (XLM) do not attend to these."""
    padding = (getattr(config, "pad_token_id", None), getattr(config, "pad_index", None))
    return [token for token in range(1, 8) if token not in padding][:5]


def _varlen(edges: Tensor, longest: int | None) -> dict[str, Any]:
    """The arguments by which transformers passes the boundaries of samples to flash attention."""
    edges = edges.to(get_accelerator().device, non_blocking=True)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether logits differ: attention to other tokens changes the leading digits, rounding only the last ones."""
    limit = (1e-4 if expected.dtype is torch.float32 else 3e-2) * expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() > limit)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with the tensors that objectives use on the device."""
    names = ("input_ids", "labels", "loss_mask", "position_ids")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def samples_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The start of each sample in the flattened batch, and its length: int64 `[n]` each.

    Rows and segments that are only padding are left out, unless there is nothing else.
    """
    if batch.cu_seqlens is not None:
        edges = batch.cu_seqlens[: max(1, batch.num_samples) + 1].long()
        return edges[:-1], edges.diff()
    count, width = batch.input_ids.shape
    lengths = torch.full((count,), width)
    if batch.padding is not None:
        lengths = (~batch.padding).sum(1)
    count = max(1, batch.num_samples)
    return torch.arange(count) * width, lengths[:count].clamp(min=1)


def unpacked(batch: Batch, learnt: Tensor, starts: Tensor, lengths: Tensor) -> Rows:
    """Samples of a batch as separate rows, `[n, longest]`, padded with token 0 on the right.

    learnt: positions with a loss in the flattened batch; those outside of these samples are dropped.
    """
    count, longest = len(lengths), int(lengths.max())
    offsets = torch.arange(longest).expand(count, longest)
    flat = batch.input_ids.reshape(-1)
    sources = (starts[:, None] + offsets).clamp(max=flat.numel() - 1)
    input_ids = flat[sources].masked_fill(offsets >= lengths[:, None], 0)
    sample = torch.searchsorted(starts, learnt, right=True) - 1
    own = (sample >= 0) & (learnt < (starts + lengths)[sample])
    learnt, sample = learnt[own], sample[own]
    return Rows(input_ids, None, sample * longest + learnt - starts[sample], learnt, {})


def _row_limit(model: nn.Module) -> float:
    """The largest number of tokens in a row: that of the mask tables that some models (GPT-Neo) keep."""
    tables = [
        b for b in model.buffers() if b.dtype is torch.bool and b.dim() > 1 and b.size(-1) == b.size(-2) > 1
    ]
    return min((table.size(-1) for table in tables), default=math.inf)


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside adapters."""
    get: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    return get() if get is not None else model
