"""Steps over the chunks of a stream: the interface of `steps.Steps`, for data of unknown length."""

import threading
from typing import Any

import numpy as np

from ..batch import Batch
from ..corpora import JoinedStore, Store, StreamStore
from ..order import EPOCH, permutation
from ..packing import Units, joined_units, pack, single
from ..settings import DataSettings
from ..steps import Batches, Layout, StepInfo
from .chunks import Chunk
from .source import ChunkSource

_KEPT = 4  # number of cached windows, because steps are accessed more than once


class StreamedSteps:
    """Training steps over a stream.

    The units of the run are numbered chunk after chunk, and each chunk has its own order. As with `Steps`, the samples
    of a step therefore depend neither on the number of ranks nor on micro_batch_size. Several threads may request
    steps at the same time; the chunks of all steps between the oldest and the newest are kept.
    """

    def __init__(
        self,
        source: ChunkSource,
        settings: DataSettings,
        layout: Layout,
        packing: str | None,
        fingerprint: str,
    ) -> None:
        """packing: value of --packing_strategy; None: samples are not packed."""
        self._source, self._settings, self._layout, self._packing = source, settings, layout, packing
        self.fingerprint = fingerprint
        self.total_steps = int(settings.train_iters)
        self._base = (0, 0)  # (step, units consumed before it)
        self._chunks: list[_Units] = []  # consecutive, from the first that is still needed
        self._next: tuple[int, int, dict[str, Any] | None] = (
            0,
            0,
            None,
        )  # chunk, its first unit, its position
        self._windows: dict[tuple[int, int], _Window] = {}
        self._lock, self._growing = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return self.total_steps

    def step(self, k: int, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
        """The microbatches of data-parallel rank `dp_rank` of `dp_size` in step `k`; waits for rows if necessary.

        Raises UserError if rows or files cannot be used, TimeoutError if no rows arrive.
        """
        return self._window(k).step(k, dp_rank, dp_size)

    def info(self, k: int) -> StepInfo:
        """Counts of step `k` over all ranks. Must be called after each step, because it releases earlier chunks."""
        info = self._window(k).info(k)
        with self._lock:
            while self._chunks and self._chunks[0].stop <= self.consumed(k):
                self._source.done_with(self._chunks.pop(0).chunk)
        return info

    def check_divides(self, dp_size: int) -> None:
        """See `Batches.check_divides`."""
        _Window([], self._settings, self._layout, self.consumed).check_divides(dp_size)

    def consumed(self, k: int) -> int:
        """Number of units used before step `k`."""
        step, consumed = self._base
        if k < step:
            raise ValueError(f"step {k} is before step {step}, from which this run was resumed")
        return consumed + (k - step) * self._settings.global_batch_size

    def epoch(self, k: int) -> float:
        """Passes over the data before step `k`, estimated by bytes."""
        if k == 0:
            return 0.0
        unit = self.consumed(k)
        with self._lock:
            for units in self._chunks:
                if unit < units.stop or units is self._chunks[-1]:
                    share = min(1.0, (unit - units.first) / max(1, units.stop - units.first))
                    before, after = units.chunk.progress
                    return before + share * (after - before)
        return 0.0

    def state_dict(self, k: int) -> dict[str, Any]:
        """The position before step `k`, as JSON."""
        return {
            "step": k,
            "consumed_samples": self.consumed(k),
            "global_batch_size": self._settings.global_batch_size,
            "seed": self._settings.data_seed,
            "fingerprint": self.fingerprint,
            "stream": self._place(self.consumed(k)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Continue at the exact row of `state`; returns warnings for what has changed since."""
        warnings = []
        self._base = (int(state["step"]), int(state["consumed_samples"]))
        stream = state.get("stream")
        if stream is None:
            warnings.append(
                "the checkpoint was trained on data that was not streamed: the stream starts at its beginning, so "
                "samples may be repeated"
            )
            self._next = (0, self._base[1], None)
        else:
            self._next = (int(stream["chunk"]), int(stream["first"]), stream["place"])
        if stream is not None and state["fingerprint"] != self.fingerprint:
            warnings.append(
                "the training data, or how it is tokenized and packed, has changed since the checkpoint: samples may "
                "be repeated or skipped in this pass"
            )
        if state["seed"] != self._settings.data_seed:
            warnings.append(
                f"--data_seed {self._settings.data_seed} is not the checkpoint's {state['seed']}: the order of samples "
                "changes"
            )
        return warnings

    def close(self) -> None:
        """End the process that reads, and remove its files."""
        self._source.close()

    def _place(self, unit: int) -> dict[str, Any]:
        """The number of the chunk with `unit`, its first unit, and its position in the stream."""
        with self._lock:
            for units in self._chunks:
                if unit < units.stop:
                    return {"chunk": units.chunk.number, "first": units.first, "place": units.chunk.start}
            number, first, place = self._next
            return {"chunk": number, "first": first, "place": place}

    def _window(self, k: int) -> "_Window":
        """The chunks of step `k` as one window."""
        first = self.consumed(k)
        stop = first + self._settings.global_batch_size
        self._reach(stop)
        with self._lock:
            needed = [units for units in self._chunks if units.stop > first and units.first < stop]
            key = needed[0].chunk.number, needed[-1].chunk.number
            if key not in self._windows:
                self._windows[key] = _Window(needed, self._settings, self._layout, self.consumed)
                for old in list(self._windows)[:-_KEPT]:
                    del self._windows[old]
            return self._windows[key]

    def _reach(self, stop: int) -> None:
        """Wait for all units before `stop`. While one thread waits for a chunk, others can use the existing ones."""
        while not self._has(stop):
            with self._growing:
                if self._has(stop):
                    return
                number, first, place = self._next
                self._source.start(number, place)
                chunk = self._source.chunk(number)
                units = _Units(chunk, first, self._settings, self._layout, self._packing)
                with self._lock:
                    self._chunks.append(units)
                    self._next = (number + 1, units.stop, chunk.end)

    def _has(self, stop: int) -> bool:
        with self._lock:
            return bool(self._chunks) and self._chunks[-1].stop >= stop


class _Units:
    """The units of a chunk and their order. first, stop: their range in the numbering of the run."""

    def __init__(
        self, chunk: Chunk, first: int, settings: DataSettings, layout: Layout, packing: str | None
    ) -> None:
        self.chunk, self.first = chunk, first
        # a different seed for each chunk, outside the range of seeds that users give
        seed = settings.data_seed + ((chunk.number + 1) << 32) if settings.is_shuffled else None
        self.store: Store = chunk.store
        if packing == "concat" and len(chunk.store.lengths):
            self.store = StreamStore(chunk.store, layout.packed_length, seed)
        if packing in (None, "concat"):
            self.units: Units = single(self.store.lengths)
        else:
            self.units = pack(self.store.lengths, layout.packed_length, packing, seed)
        n = len(self.units)
        self.order = np.arange(n) if seed is None else permutation(n, seed, EPOCH)
        self.stop = first + n


class _Window(Batches):
    """Consecutive chunks as one store, and the steps that they contain."""

    def __init__(self, chunks: list[_Units], settings: DataSettings, layout: Layout, consumed: Any) -> None:
        chunks = [chunk for chunk in chunks if len(chunk.units)]
        self._consumed = consumed
        store = JoinedStore([chunk.store for chunk in chunks]) if chunks else _Nothing()
        units = joined_units([chunk.units for chunk in chunks]) if chunks else single(np.zeros(0, np.int64))
        super().__init__(store, units, settings, layout)
        if chunks:
            offsets = np.cumsum([0, *(len(chunk.units) for chunk in chunks)])
            self._first = chunks[0].first
            self._order = np.concatenate([c.order + at for c, at in zip(chunks, offsets, strict=False)])

    def _units(self, k: int) -> np.ndarray:
        places = self._consumed(k) - self._first + np.arange(self.global_batch_size)
        return self._order[places]


class _Nothing:
    """A store without samples."""

    lengths = np.zeros(0, np.int64)
