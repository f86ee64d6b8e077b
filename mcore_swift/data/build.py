"""Tokenize a data set into a store: rows in order, in one process or several, a few blocks in memory at a time."""

import json
import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, UserErrors
from .cache import TokenWriter
from .encode import DROPPED, Encoded, Encoder, RawRow
from .problems import Problem, Tally
from .readers import read_rows
from .report import PartReport
from .selection import Part
from .settings import DataSettings

logger = logging.getLogger(__name__)

_BLOCK_ROWS, _BLOCK_BYTES = 512, 4 << 20  # a block ends at whichever comes first
_POOL_WORTH = 16 << 20  # bytes of files from which starting processes (seconds of imports) pays
_WORKER_LIMIT = 1800.0  # seconds for a block, which takes a minute at most on a working machine


def build_part(
    part: Part, path: Path, key: str, tokenizer: Any, settings: DataSettings, max_length: int | None
) -> None:
    """Tokenize `part` into a store at `path` (a folder that does not exist yet).

    Raises UserError(s): rows that cannot be used (unless --strict false), files without a usable row, no sample
    left, a file that cannot be read.
    """
    _Build(part, path, tokenizer, settings, max_length).run(key)


class _Build:
    def __init__(
        self, part: Part, path: Path, tokenizer: Any, settings: DataSettings, max_length: int | None
    ) -> None:
        self._part, self._settings = part, settings
        self._tokenizer, self._max_length = tokenizer, max_length
        self._writer = TokenWriter(path)
        self._held_back = path / "rows.jsonl" if part.held_back else None
        self._errors, self._dropped = Tally(), Tally()
        self._report = PartReport()
        self._parsed: dict[Path, list[int]] = {}  # file -> [rows, rows that parsed]
        self._bases: list[int] = []  # number of each source's first row
        self._started = self._told = time.monotonic()

    def run(self, key: str) -> None:
        num_bytes = sum(file.stat().st_size for source in self._part.sources for file in source.files)
        made_of = self._tokenizer, self._settings, self._max_length
        with BlocksEncoder(num_bytes, *made_of) as submit:
            waiting: deque[tuple[Path, int, Future | Callable]] = deque()
            for file, rows in self._blocks():
                waiting.append((file, len(rows), submit(rows, check_only=self._errors.total > 0)))
                if len(waiting) > 3 * self._settings.dataset_num_proc:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
        self._refuse()
        index = self._index()
        self._finish_report(index)
        self._writer.finish(key, index, self._report.to_json(), [self._held_back] if self._held_back else [])

    def _blocks(self) -> Iterator[tuple[Path, list[RawRow]]]:
        """Blocks of wanted rows, none of which spans files. Also stores the rows of a validation set."""
        number = 0
        save = self._held_back.open("wb") if self._held_back else None
        try:
            for source, wanted in zip(self._part.sources, self._part.rows, strict=True):
                base = number
                self._bases.append(base)
                mask = None if wanted is None else np.bincount(wanted, minlength=1).astype(bool)
                for file in source.files:
                    block, size = [], 0
                    for row in read_rows(file):
                        at, number = number - base, number + 1
                        if mask is not None and (at >= len(mask) or not mask[at]):
                            continue
                        block.append(RawRow(number - 1, f"{file}:{row.line}", row.data))
                        raw = _raw(row.data) if save or isinstance(row.data, bytes) else b""
                        size += len(raw)
                        if save:
                            save.write(raw + b"\n")
                        if len(block) >= _BLOCK_ROWS or size >= _BLOCK_BYTES:
                            yield file, block
                            block, size = [], 0
                    if block:
                        yield file, block
        finally:
            if save:
                save.close()

    def _take(self, file: Path, rows: int, future: Any) -> None:
        result: Encoded | list[Problem] = future() if callable(future) else wait_for(future, file)
        counts = self._parsed.setdefault(file, [0, 0])
        if isinstance(result, list):  # rows were only checked
            problems, parsed = result, rows
        else:
            problems, parsed = result.problems, result.parsed
            self._report.truncated += result.truncated
            self._report.learnt_tokens += int(np.count_nonzero(result.weights))
            self._writer.append(result)
        counts[0] += rows
        counts[1] += parsed
        self._report.rows += rows
        for problem in problems:
            lenient = self._settings.strict is False or problem.kind in DROPPED
            (self._dropped if lenient else self._errors).add([problem])
        if time.monotonic() - self._told > 30:
            self._told = time.monotonic()
            logger.info("tokenized %d rows, %d tokens", self._report.rows, self._writer.tokens)

    def _refuse(self) -> None:
        errors = self._errors.errors(
            "mend or remove these rows, or add --strict false to drop and count such rows"
        )
        for file, (rows, parsed) in self._parsed.items():
            if self._settings.strict is False and rows and not parsed:
                errors.append(
                    UserError(f"{file}: none of its {rows} rows is JSON", "check the file and its extension")
                )
        if not errors and not self._writer.samples:
            reasons = "; ".join(f"{count} rows: {kind}" for kind, count in self._dropped.counts.items())
            examples = [str(problem) for problem in self._dropped.first[:3]]
            flag = "--dataset" if self._part.name == "train" else "--val_dataset"
            names = ", ".join(source.spec for source in self._part.sources)
            text = f"no row of {flag} {names} is left ({reasons or 'there are no rows'})"
            errors.append(UserError("\n  ".join([text, *examples]), _remedy(self._dropped)))
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise UserErrors(errors)

    def _index(self) -> np.ndarray | None:
        """Sample numbers in the order of the wanted rows; None if they were written in that order."""
        if all(rows is None for rows in self._part.rows):
            return None
        of_sample = self._writer.rows()
        ends = [*self._bases[1:], np.iinfo(np.int64).max]
        pieces = []
        for base, end, wanted in zip(self._bases, ends, self._part.rows, strict=True):
            if wanted is None:
                pieces.append(np.arange(*np.searchsorted(of_sample, [base, end])))
                continue
            first = np.searchsorted(of_sample, base + wanted, side="left")
            counts = np.searchsorted(of_sample, base + wanted, side="right") - first
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            pieces.append(np.repeat(first, counts) + within)
        return np.concatenate(pieces)

    def _finish_report(self, index: np.ndarray | None) -> None:
        report = self._report
        report.tokens = self._writer.tokens
        report.samples = self._writer.samples if index is None else len(index)
        report.dropped, report.examples = dict(self._dropped.counts), self._dropped.examples
        report.seconds = time.monotonic() - self._started


def wait_for(future: Future, file: Path) -> Encoded | list[Problem]:
    """The result of a block of rows of `file`. Raises RuntimeError if its worker process hangs."""
    try:
        return future.result(timeout=_WORKER_LIMIT)
    except TimeoutError:
        raise RuntimeError(
            f"{file}: a block of rows was not tokenized within {_WORKER_LIMIT:.0f} s"
        ) from None


def _raw(data: Any) -> bytes:
    if isinstance(data, bytes):
        return data
    return json.dumps(data if isinstance(data, dict) else {}, ensure_ascii=False, default=str).encode()


def _remedy(dropped: Tally) -> str:
    if dropped.counts.most_common(1)[0][0] == "longer than max_length" if dropped.counts else False:
        return "raise --max_length, or cut samples with --truncation_strategy right"
    return "check the columns of the rows, and name them with --columns if need be"


# --- workers ------------------------------------------------------------------------------------------------

_encoder: Encoder | None = None  # in a worker process


class BlocksEncoder:
    """Context manager that gives `submit(rows, check_only)`, which returns a Future or, with one process, a function
    that computes the result."""

    def __init__(self, num_bytes: int, *made_of: Any) -> None:
        self._bytes, self._made_of = num_bytes, made_of  # arguments of Encoder
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Callable[..., Any]:
        workers = self._made_of[1].dataset_num_proc
        if workers <= 1 or self._bytes < _POOL_WORTH:
            encoder = Encoder(*self._made_of)
            return lambda rows, check_only: (
                lambda: encoder.check(rows) if check_only else encoder.encode(rows)
            )
        # spawn: this process may hold threads, sockets and devices that a fork would break
        context = multiprocessing.get_context("spawn")
        Encoder(*self._made_of)  # its errors (no chat template) are better raised here than in a worker
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, self._made_of)
        return lambda rows, check_only: self._pool.submit(_work, rows, check_only)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=error is None, cancel_futures=True)
            for worker in workers if error is not None else ():
                worker.terminate()  # it may hang, and its work is no longer needed
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a process that tokenizes was killed, most likely because memory ran out",
                f"use a --dataset_num_proc lower than {self._made_of[1].dataset_num_proc}",
            ) from None


def _start_worker(tokenizer: Any, settings: DataSettings, max_length: int | None) -> None:
    global _encoder
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes already use the cores
    _encoder = Encoder(tokenizer, settings, max_length)


def _work(rows: list[RawRow], check_only: bool) -> Encoded | list[Problem]:
    assert _encoder is not None
    return _encoder.check(rows) if check_only else _encoder.encode(rows)
