"""Which rows of each source are used for training (`#N`) and which are held back (`split_dataset_ratio`)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from .order import SAMPLE, SPLIT, permutation
from .readers import count_rows
from .settings import DataSettings
from .sources import Source


@dataclass
class Part:
    """The rows of one data set, train or val.

    rows: for each source, the numbers of its rows to use, counted from 0 over its files; a row may occur more than
    once (`#N` above the number of rows). None: every row once. held_back: the part was split off the training rows.
    """

    name: str
    sources: list[Source]
    rows: list[np.ndarray | None]
    held_back: bool = False

    @property
    def is_indexed(self) -> bool:
        return self.sources[0].is_indexed

    def pieces(self, each_alone: bool) -> Iterator["Part"]:
        """The part, split so that indexed datasets, or with each_alone all sources, have stores of their own."""
        start = 0
        for stop in range(1, len(self.sources) + 1):
            ends = stop == len(self.sources) or each_alone
            if ends or self.sources[stop].is_indexed or self.sources[stop - 1].is_indexed:
                yield replace(self, sources=self.sources[start:stop], rows=self.rows[start:stop])
                start = stop


def select_parts(train: list[Source], val: list[Source], settings: DataSettings) -> list[Part]:
    """The parts of a run: train, and val if there is a validation set or a ratio to split off.

    Rows are counted only if their number is needed. Raises UserError if a split leaves nothing to train on.
    """
    ratio = 0.0 if val else settings.split_dataset_ratio
    parts = [Part("train", train, []), Part("val", val or train, [], held_back=not val)]
    for number, source in enumerate(train):
        if source.take is None and ratio == 0:
            parts[0].rows.append(None)
            continue
        rows = _take(source, number, settings)
        kept, held_back = _split(source, rows, ratio, number, settings) if ratio else (rows, rows[:0])
        parts[0].rows.append(kept)
        if not val:
            parts[1].rows.append(held_back)
    if val:
        offset = len(train)  # so that a train and a val source with the same #N draw different rows
        parts[1].rows = [
            None if source.take is None else _take(source, offset + number, settings)
            for number, source in enumerate(val)
        ]
    return parts if val or ratio else parts[:1]


def _take(source: Source, number: int, settings: DataSettings) -> np.ndarray:
    n = sum(count_rows(path) for path in source.files)
    if n == 0:
        raise UserError(f"{source.spec}: there are no rows")
    if source.take is None:
        return np.arange(n)
    copies, rest = divmod(source.take, n)
    some = (
        permutation(n, settings.data_seed, SAMPLE, number)[:rest]
        if settings.dataset_shuffle
        else np.arange(rest)
    )
    return np.concatenate([np.tile(np.arange(n), copies), np.sort(some)])


def _split(
    source: Source, rows: np.ndarray, ratio: float, number: int, settings: DataSettings
) -> tuple[np.ndarray, np.ndarray]:
    different = np.unique(rows)  # copies of a row must not be on both sides of the split
    count = max(1, int(len(different) * ratio))
    if count >= len(different):
        raise UserError(
            f"{source.spec}: --split_dataset_ratio {ratio} of {len(different)} rows leaves none to train on",
            "lower the ratio, or give --val_dataset",
        )
    if settings.dataset_shuffle:
        held_back = np.sort(different[permutation(len(different), settings.data_seed, SPLIT, number)[:count]])
    else:
        held_back = different[-count:]
    return rows[~np.isin(rows, held_back)], held_back
