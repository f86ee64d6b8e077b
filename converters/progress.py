"""How far a conversion is: bytes done of all, bytes per second, time left."""

import sys
import time
from typing import Any, Protocol, Self

from converters.ranks import Ranks
from mcore_swift.observability import format_duration

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Progress(Protocol):
    """What is told of a conversion while it runs, by each process of its own share."""

    def begin(self, total: int, share: int, done: int) -> None:
        """total: bytes of weights that all processes write; share: this one's; done: of that, before it began."""

    def advance(self, nbytes: int) -> None:
        """This process has written so many more bytes."""


class Silent:
    """The progress of a caller who does not care."""

    def begin(self, total: int, share: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


class Shown:
    """A bar on a terminal, a line now and then elsewhere, and one at the end. The first rank speaks.

    It knows its own share; the others are taken to be as far.
    """

    def __init__(self, what: str, ranks: Ranks) -> None:
        self._what, self._ranks = what, ranks
        self._total = self._done = self._before = 0
        self._share = 1
        self._started = self._shown = time.monotonic()
        self._bar: Any = None

    def begin(self, total: int, share: int, done: int) -> None:
        self._total, self._share, self._done, self._before = total, max(share, 1), done, done
        self._started = self._shown = time.monotonic()
        if self._ranks.is_first and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=self._of_all(done), unit="B", unit_scale=True, dynamic_ncols=True
            )

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if not self._ranks.is_first:
            return
        done = self._of_all(self._done)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            print(self._line(done), flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None and self._ranks.is_first:
            seconds = time.monotonic() - self._started
            written = self._total - self._of_all(self._before)
            print(
                f"{self._what}: {size(written)} written in {seconds:.1f} s, {self._rate(written)}", flush=True
            )

    def _of_all(self, share: int) -> int:
        return min(self._total, round(share / self._share * self._total))

    def _line(self, done: int) -> str:
        new = done - self._of_all(self._before)
        seconds = time.monotonic() - self._started
        left = format_duration((self._total - done) * seconds / new) if new else "unknown"
        share = done / self._total if self._total else 1.0
        return f"{size(done)} of {size(self._total)} ({share:.0%}) · {self._rate(new)} · {left} left"

    def _rate(self, nbytes: int) -> str:
        return f"{size(nbytes / max(time.monotonic() - self._started, 1e-9))}/s"


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
