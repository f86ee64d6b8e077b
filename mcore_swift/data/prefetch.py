"""Prepare the batches of coming steps in a thread, and measure how long the loop waits for them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .batch import Batch


class Prefetcher:
    """Iterates over `(k, batches)` for k = start, start + 1, ... in order, prepared up to `depth` steps ahead.

    make: makes the batches of a step, e.g. `lambda k: steps.step(k, dp_rank, dp_size)`. An exception in it is raised
    where the loop takes that step. wait_seconds: what the last step was waited for; total_wait_seconds: all of them.
    Use it in a `with`, or call `close`, so that the thread ends with the loop.
    """

    def __init__(
        self, make: Callable[[int], list[Batch]], start: int, stop: int, depth: int = 2, limit: float = 600.0
    ) -> None:
        self._make, self._range, self._limit = make, range(start, stop), limit
        self._queue: queue.Queue[tuple[int, list[Batch] | BaseException]] = queue.Queue(maxsize=max(1, depth))
        self._stopped = threading.Event()
        self._at = start
        self.wait_seconds = self.total_wait_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        if self._at >= self._range.stop or self._stopped.is_set():
            raise StopIteration
        start = time.perf_counter()
        k, batches = self._next_item()
        self.wait_seconds = time.perf_counter() - start
        self.total_wait_seconds += self.wait_seconds
        if isinstance(batches, BaseException):
            self.close()
            raise batches
        self._at = k + 1
        return k, batches

    def _next_item(self) -> tuple[int, Any]:
        try:
            return self._queue.get(timeout=self._limit)
        except queue.Empty:
            raise TimeoutError(
                f"the batches of step {self._at} were not ready within {self._limit:.0f} s: reading the token cache hangs"
            ) from None

    def _run(self) -> None:
        for k in self._range:
            try:
                item: list[Batch] | BaseException = self._make(k)
            except BaseException as error:  # raised again by the loop
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put((k, item), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or isinstance(item, BaseException):
                return

    def close(self) -> None:
        """Stop the thread and wait for it, which takes one step's preparation at most."""
        self._stopped.set()
        self._thread.join(timeout=self._limit)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
