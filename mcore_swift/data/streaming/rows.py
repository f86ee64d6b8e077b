"""An endless stream of rows from the sources of a run, and the place in it, as plain JSON."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..order import FILES, permutation
from ..readers import Place, Row, read_rows_from
from ..sources import Source


class Track:
    """The rows of some sources, one pass over them after the other.

    seed: the files of each pass come in an order of their own; None keeps theirs. number: which track of several, so
    that they are not shuffled alike. `path#N` is the first N rows of its files, which stay together.
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
        """Go to where `state()` was taken."""
        self._pass, self._item = state["pass"], state["item"]
        self._file, self._taken, self._place = state["file"], state["taken"], Place(*state["place"])
        self._reader: Iterator[tuple[Row, Place]] | None = None
        self._shuffle()

    def state(self) -> dict[str, Any]:
        """The place of the next row."""
        return {
            "pass": self._pass,
            "item": self._item,
            "file": self._file,
            "taken": self._taken,
            "place": list(self._place),
        }

    def progress(self) -> float:
        """Passes so far; a pass is as far as its share of bytes, which is told within files of lines only."""
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
        """Go to the first file of the next item; False if that is of the next pass."""
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
    """Rows of all sources: joined, or in the proportions of weights, at each place as near to them as can be.

    weights: one for each source; empty: they are joined, and `next` says where a pass ends. With weights a source that
    is used up begins again by itself. Rows are drawn as `blend.Blended` draws samples: by when they are due.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int | None, *, longest: bool = False
    ) -> None:
        """longest: a pass of several sources ends with the last of them that is used up, not with the first."""
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
        """The place of the next row, as plain JSON."""
        return {"drawn": list(self._drawn), "tracks": [track.state() for track in self._tracks]}

    def progress(self) -> float:
        return self._ends(track.progress() for track in self._tracks)

    def next(self) -> tuple[Path, Row] | None:
        """The next row and its file; None once where a pass over joined sources ends."""
        due = [(drawn + 0.5) / weight for drawn, weight in zip(self._drawn, self._weights, strict=True)]
        number = due.index(min(due))
        found = self._tracks[number].next()
        if found is None and len(self._tracks) > 1:
            found = self._tracks[number].next()
        if found is not None:
            self._drawn[number] += 1
        return found
