"""An endless stream of rows from the sources of a run, with its position as JSON."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..order import FILES, permutation
from ..readers import Place, Row, read_rows_from
from ..sources import Source


class Track:
    """The rows of some sources, pass after pass.

    seed: shuffles the order of files in each pass; None keeps it. number: index among several tracks, so that each is
    shuffled differently. `path#N` means the first N rows of its files, which are kept together.
    """

    def __init__(self, sources: Sequence[Source], seed: int | None, number: int = 0) -> None:
        self._seed, self._number = seed, number
        self._items: list[tuple[tuple[Path, ...], int | None]] = []
        for source in sources:
            if source.take is None:
                self._items += [((file,), None) for file in source.files]
            else:
                self._items.append((source.files, source.take))
        self._bytes = [[file.stat().st_size for file in files] for files, _ in self._items]
        self._all_bytes = max(1, sum(map(sum, self._bytes)))
        self.seek({"pass": 0, "item": 0, "file": 0, "taken": 0, "place": [0, 0, 0]})

    def seek(self, state: dict[str, Any]) -> None:
        """Go to the position that `state()` returned."""
        self._pass, self._item = state["pass"], state["item"]
        self._file, self._taken, self._place = state["file"], state["taken"], Place(*state["place"])
        self._reader: Iterator[tuple[Row, Place]] | None = None
        self._shuffle()

    def state(self) -> dict[str, Any]:
        """The position of the next row."""
        return {
            "pass": self._pass,
            "item": self._item,
            "file": self._file,
            "taken": self._taken,
            "place": list(self._place),
        }

    def progress(self) -> float:
        """Number of passes, with the fraction of the current one by bytes.

        Within a file, the fraction is known for line-based formats only.
        """
        done = sum(sum(self._bytes[i]) for i in self._order[: self._item])
        done += sum(self._bytes[self._order[self._item]][: self._file]) + self._place.offset
        return self._pass + done / self._all_bytes

    def next(self) -> tuple[Path, Row] | None:
        """The next row and its file; None once at the end of each pass, after which the next pass begins."""
        while True:
            files, take = self._items[self._order[self._item]]
            if take is not None and self._taken == take:
                self._file = len(files)
            if self._file == len(files):
                if self._next_item():
                    continue
                return None
            if self._reader is None:
                self._reader = read_rows_from(files[self._file], self._place)
            row, place = next(self._reader, (None, None))
            if row is None:
                self._file, self._place, self._reader = self._file + 1, Place(), None
                continue
            self._place, self._taken = place, self._taken + 1
            return files[self._file], row

    def _next_item(self) -> bool:
        """Go to the first file of the next item; False if that begins the next pass."""
        self._item, self._file, self._taken, self._place, self._reader = self._item + 1, 0, 0, Place(), None
        if self._item < len(self._items):
            return True
        self._item, self._pass = 0, self._pass + 1
        self._shuffle()
        return False

    def _shuffle(self) -> None:
        n = len(self._items)
        if self._seed is None:
            self._order = list(range(n))
        else:
            self._order = permutation(n, self._seed, FILES, (self._number << 32) + self._pass).tolist()


class RowStream:
    """The rows of all sources: concatenated, or interleaved by weights, as close to the proportions as possible.

    weights: one per source; empty: the sources are concatenated, and `next` signals the end of a pass. With weights, an
    exhausted source starts again by itself. Rows are interleaved as `blend.Blended` does with samples.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int | None, *, longest: bool = False
    ) -> None:
        """longest: a pass over several sources ends when the last of them is exhausted, not the first."""
        groups = [[source] for source in sources] if weights else [list(sources)]
        self._tracks = [Track(group, seed, number) for number, group in enumerate(groups)]
        self._weights = list(weights) or [1.0]
        self._drawn = [0] * len(self._tracks)
        self._ends = min if longest else max

    def seek(self, state: dict[str, Any]) -> None:
        self._drawn = list(state["drawn"])
        for track, place in zip(self._tracks, state["tracks"], strict=True):
            track.seek(place)

    def state(self) -> dict[str, Any]:
        """The position of the next row, as JSON."""
        return {"drawn": list(self._drawn), "tracks": [track.state() for track in self._tracks]}

    def progress(self) -> float:
        return self._ends(track.progress() for track in self._tracks)

    def next(self) -> tuple[Path, Row] | None:
        """The next row and its file; None once at the end of a pass over concatenated sources."""
        due = [(drawn + 0.5) / weight for drawn, weight in zip(self._drawn, self._weights, strict=True)]
        number = due.index(min(due))
        found = self._tracks[number].next()
        if found is None and len(self._tracks) > 1:
            found = self._tracks[number].next()
        if found is not None:
            self._drawn[number] += 1
        return found
