"""Where the time of a step goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall time by named phase: forward_backward, optimizer, data_wait, save, eval.

        with timer("optimizer"):
            optimizer.step()
        report = StepReport(..., phases_s=timer.take())

    synchronize: called at both ends of a phase, so that asynchronous work on a device counts in the phase that
    started it. This prevents overlap; leave it out unless phases are being measured.
    clock: a monotonic clock in seconds; replaced in tests.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block. Phases may nest; the inner one's time counts in both."""
        if self._synchronize:
            self._synchronize()
        start = self._clock()
        try:
            yield
        finally:
            if self._synchronize:
                self._synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def seconds(self, phase: str) -> float:
        """Seconds in `phase` since the last `take`; 0.0 for a phase not entered."""
        return self._seconds.get(phase, 0.0)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; resets them to zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds
