"""Which samples each step, rank and microbatch gets: with random access, and without communication between ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .batch import Batch, end_to_end, padded, padded_length
from .blend import Order, Shuffled
from .corpora import Store
from .packing import Units
from .prefetch import Prefetcher
from .settings import DataSettings


@dataclass(frozen=True)
class Layout:
    """How samples lie in a batch.

    packed_length: tokens of a packed row; None without packing. padding_multiple: rows are padded to a multiple of it.
    uniform: all microbatches of a step have the longest one's shape, as pipelines need; if False, each has its own.
    segment_multiple: in a row of several samples, each is padded to a multiple of it; it divides padding_multiple.
    Packs are planned without this padding, so a row may become longer than packed_length.
    """

    padding_free: bool
    packed_length: int | None
    padding_multiple: int
    pad_id: int
    uniform: bool = True
    segment_multiple: int = 1


@dataclass(frozen=True)
class StepInfo:
    """One step over all data-parallel ranks: what is in it, and the share of its positions that is padding."""

    num_samples: int
    num_tokens: int
    sum_of_squares: int  # of the samples' lengths: proportional to the cost of attention
    shape: tuple[int, int]  # [b, s] of the longest microbatch, and of all with uniform shapes
    padding_share: float


class Batches:
    """Steps of the units that a subclass chooses (`_units`: int64 [global_batch_size], -1 is a filler)."""

    total_steps: int

    def __init__(self, store: Store, units: Units, settings: DataSettings, layout: Layout) -> None:
        self.store, self.units, self.layout = store, units, layout
        self.micro_batch_size, self.global_batch_size = settings.micro_batch_size, settings.global_batch_size
        self._occupied = self._places_of_units()

    def __len__(self) -> int:
        return self.total_steps

    def _units(self, k: int) -> np.ndarray:
        raise NotImplementedError

    def step(self, k: int, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
        """The microbatches of data-parallel rank `dp_rank` of `dp_size` in step `k`, counted from 0.

        If the layout is uniform, all microbatches of a step have the same shape on all ranks. Raises UserError if
        micro_batch_size * dp_size does not divide the global batch.
        """
        self.check_divides(dp_size)
        micro = self._microbatches(k)
        shapes = zip(micro, self._lengths(micro).tolist(), strict=True)
        return [self._batch(units[units >= 0], s) for units, s in list(shapes)[dp_rank::dp_size]]

    def prefetch(
        self,
        start: int,
        stop: int | None = None,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        workers: int = 1,
        ahead: int = 2,
    ) -> Prefetcher:
        """Iterate over `(k, batches)` of this rank for k in range(start, stop), prepared ahead; stop None: the end."""
        self.check_divides(dp_size)
        stop = self.total_steps if stop is None else stop
        return Prefetcher(lambda k: self.step(k, dp_rank, dp_size), start, stop, workers, ahead)

    def info(self, k: int) -> StepInfo:
        """Counts of step `k` over all ranks, from the lengths alone."""
        micro = self._microbatches(k)
        lengths = self._lengths(micro)
        units = micro[micro >= 0]
        tokens = int(self.units.tokens[units].sum())
        samples = np.concatenate([self.units.samples(unit) for unit in units]) if units.size else units
        squares = int((self.store.lengths[samples].astype(np.int64) ** 2).sum())
        b = 1 if self.layout.padding_free else self.micro_batch_size
        shape = b, int(lengths.max())
        return StepInfo(len(samples), tokens, squares, shape, 1 - tokens / (b * int(lengths.sum())))

    def close(self) -> None:
        """Release what produces the steps: nothing here, since they are read from existing files."""

    def check_divides(self, dp_size: int) -> None:
        """Raise UserError if a global batch cannot be divided among `dp_size` ranks in whole microbatches."""
        unit = self.micro_batch_size * dp_size
        if self.global_batch_size % unit:
            up = -(-self.global_batch_size // unit) * unit
            raise UserError(
                f"--global_batch_size {self.global_batch_size} is no multiple of --micro_batch_size "
                f"{self.micro_batch_size} times {dp_size} data-parallel ranks",
                f"use --global_batch_size {up}, or another --micro_batch_size",
            )

    def _microbatches(self, k: int) -> np.ndarray:
        """Units of each microbatch, int64 [microbatches, micro_batch_size]; rank r takes those at r::dp_size."""
        units = self._units(k)
        if self.micro_batch_size > 1 and self.layout.padding_free and self.layout.packed_length is None:
            units = self._balanced(units)
        return units.reshape(-1, self.micro_batch_size)

    def _balanced(self, units: np.ndarray) -> np.ndarray:
        """Distribute long and short samples in a zigzag (down, up, down ...), so that padding-free rows are of similar
        length."""
        lengths = np.where(units >= 0, self.units.tokens[units], 0)
        dealt = units[np.argsort(-lengths, kind="stable")].reshape(self.micro_batch_size, -1)
        dealt[1::2] = dealt[1::2, ::-1]
        return dealt.T.reshape(-1)

    def _lengths(self, micro: np.ndarray) -> np.ndarray:
        """Sequence length s of each microbatch, int64 [microbatches]."""
        places = np.where(micro >= 0, self._occupied[micro], 0)
        lengths = places.sum(axis=1) if self.layout.padding_free else places.max(axis=1)
        if self.layout.packed_length is not None:
            lengths = np.maximum(lengths, self.layout.packed_length * self.micro_batch_size)
        lengths = np.maximum(lengths, 1)  # microbatches of fillers in an evaluation step
        if self.layout.uniform:
            lengths = np.full(len(micro), lengths.max())
        return padded_length(lengths, self.layout.padding_multiple)

    def _places_of_units(self) -> np.ndarray:
        """Positions that each unit takes in a row, int64 [units]: its tokens and the padding of its samples."""
        multiple = self.layout.segment_multiple
        if multiple == 1 or not len(self.units):
            return self.units.tokens
        places = padded_length(self.store.lengths[self.units.members].astype(np.int64), multiple)
        return np.add.reduceat(places, self.units.starts[:-1])

    def _batch(self, units: np.ndarray, s: int) -> Batch:
        samples = [int(sample) for unit in units for sample in self.units.samples(unit)]
        if self.layout.padding_free:
            return end_to_end(self.store, samples, s, self.layout.pad_id, self.layout.segment_multiple)
        return padded(self.store, samples, self.micro_batch_size, s, self.layout.pad_id)


class Steps(Batches):
    """Training steps.

    `order` determines unit number g of the run, counted over all epochs; by default it is number g % n in the order of
    epoch g // n, so that every unit comes once per epoch. Step k takes global_batch_size units, starting with number
    k * global_batch_size. So the samples of a step depend neither on the number of ranks nor on micro_batch_size.
    """

    def __init__(
        self,
        store: Store,
        units: Units,
        settings: DataSettings,
        layout: Layout,
        fingerprint: str,
        warn: Callable[[str], None] = lambda _: None,
        order: Order | None = None,
    ) -> None:
        super().__init__(store, units, settings, layout)
        self.fingerprint = fingerprint
        self._seed = settings.data_seed
        self._order = order or Shuffled(len(units), settings.data_seed, settings.train_dataloader_shuffle)
        self._iters, self._epochs = settings.train_iters, settings.num_train_epochs
        self._base = (0, 0)  # (step, units consumed before it)
        n = len(self._order)
        if n < self.global_batch_size:
            what = "packed rows" if layout.packed_length is not None else "samples"
            warn(
                f"there are only {n} {what} for steps of {self.global_batch_size}: a step takes "
                "some of them more than once"
            )
        self.total_steps = self._total()

    def _total(self) -> int:
        if self._iters is not None:
            return int(self._iters)
        if self._epochs is None:
            raise UserError(
                "neither --num_train_epochs nor --train_iters says when to stop", "add --num_train_epochs 1"
            )
        step, consumed = self._base
        left = math.floor(self._epochs * len(self._order) + 1e-9) - consumed
        return max(1, step + max(0, left // self.global_batch_size))

    def consumed(self, k: int) -> int:
        """Number of units used before step `k`."""
        step, consumed = self._base
        if k < step:
            raise ValueError(f"step {k} is before step {step}, from which this run was resumed")
        return consumed + (k - step) * self.global_batch_size

    def epoch(self, k: int) -> float:
        """Passes over the data before step `k`."""
        return self.consumed(k) / len(self._order)

    def _units(self, k: int) -> np.ndarray:
        return self._order.units(self.consumed(k) + np.arange(self.global_batch_size))

    def state_dict(self, k: int) -> dict[str, Any]:
        """The position before step `k`, as plain JSON values."""
        return {
            "step": k,
            "consumed_samples": self.consumed(k),
            "num_samples": len(self._order),
            "global_batch_size": self.global_batch_size,
            "seed": self._seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Continue at the position of `state`; returns warnings for what has changed since.

        With another global_batch_size, the run continues after the samples consumed so far, and total_steps changes
        accordingly.
        """
        self._base = (int(state["step"]), int(state["consumed_samples"]))
        self.total_steps = self._total()
        warnings = []
        if state["fingerprint"] != self.fingerprint:
            warnings.append(
                "the training data or how it is tokenized and packed has changed since the checkpoint "
                f"({len(self._order)} samples now, {state.get('num_samples', 'a stream')} then): the run goes on after "
                f"{state['consumed_samples']} samples of the new order, so some samples may come twice or not at "
                "all in this epoch"
            )
        if state["seed"] != self._seed:
            warnings.append(
                f"--data_seed {self._seed} is not the checkpoint's {state['seed']}: samples come in another order"
            )
        if state["global_batch_size"] != self.global_batch_size:
            warnings.append(
                f"a step takes {self.global_batch_size} samples, and {state['global_batch_size']} when the "
                f"checkpoint was written: going on after {state['consumed_samples']} samples, "
                f"{self.total_steps} steps in all"
            )
        return warnings


class EvalSteps(Batches):
    """Evaluation steps: every unit once, in order; the last step is completed with rows of padding."""

    def __init__(self, store: Store, units: Units, settings: DataSettings, layout: Layout) -> None:
        super().__init__(store, units, settings, layout)
        self.total_steps = -(-len(units) // self.global_batch_size)

    def _units(self, k: int) -> np.ndarray:
        if not 0 <= k < self.total_steps:
            raise IndexError(f"evaluation step {k} of {self.total_steps}")
        units = np.full(self.global_batch_size, -1, np.int64)
        first = k * self.global_batch_size
        real = min(self.global_batch_size, len(self.units) - first)
        units[:real] = np.arange(first, first + real)
        return units
