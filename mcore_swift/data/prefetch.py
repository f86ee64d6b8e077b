"""Prepare the batches of upcoming steps in threads, and measure how long the loop waits for them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .batch import Batch


class Prefetcher:
    """Iterates over `(k, batches)` for k = start, start + 1, ... below stop, in order, prepared ahead by threads.

    make: makes the batches of a step, e.g. `lambda k: steps.step(k, dp_rank, dp_size)`. Its exceptions are raised
    when the loop takes that step. workers: number of threads; 0 prepares each step on request. ahead: steps that each
    thread keeps ready. limit: seconds to wait for a step before raising TimeoutError.
    wait_seconds: time spent waiting for the last step; total_wait_seconds: for all steps.
    Use it in a `with`, or call `close`, so that the threads end with the loop.
    """

    def __init__(
        self,
        make: Callable[[int], list[Batch]],
        start: int,
        stop: int,
        workers: int = 1,
        ahead: int = 2,
        limit: float = 600.0,
    ) -> None:
        self._make, self._limit = make, limit
        self._steps = iter(range(start, stop))
        self._pool = ThreadPoolExecutor(workers, "data-prefetch") if workers > 0 else None
        self._ready: deque[tuple[int, Future[list[Batch]]]] = deque()
        self.wait_seconds = self.total_wait_seconds = 0.0
        for _ in range(workers * max(1, ahead)):
            self._submit()

    def _submit(self) -> None:
        k = next(self._steps, None)
        if k is not None and self._pool is not None:
            self._ready.append((k, self._pool.submit(self._make, k)))

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        begin = time.perf_counter()
        if self._pool is None:
            k = next(self._steps)
            batches = self._make(k)
        elif not self._ready:
            raise StopIteration
        else:
            k, batches = self._take()
        self.wait_seconds = time.perf_counter() - begin
        self.total_wait_seconds += self.wait_seconds
        return k, batches

    def _take(self) -> tuple[int, list[Batch]]:
        k, future = self._ready.popleft()
        try:
            batches = future.result(timeout=self._limit)
        except BaseException as error:
            self.close(wait=False)
            if isinstance(error, TimeoutError) and not future.done():
                text = f"the batches of step {k} were not ready within {self._limit:.0f} s: the token cache hangs"
                raise TimeoutError(text) from None
            raise
        self._submit()
        return k, batches

    def close(self, wait: bool = True) -> None:
        """End the threads. wait: until they have finished the steps that they are working on."""
        self._steps = iter(())
        self._ready.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()
