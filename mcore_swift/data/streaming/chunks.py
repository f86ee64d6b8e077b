"""Chunks of a stream: small token caches, each with its position in the stream."""

import json
import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, UserErrors
from ..build import BlocksEncoder, wait_for
from ..cache import TokenStore, TokenWriter, open_store
from ..encode import DROPPED, Encoded, RawRow
from ..problems import Tally
from ..report import PartReport
from ..settings import DataSettings
from ..sources import Source
from .rows import RowStream

LONGEST_CHUNK = 64 << 20
"""Bytes of rows at which a chunk ends, however many rows there are."""
_PACKS, _BYTES_PER_TOKEN = 128, 4
"""Minimum number of packed rows per chunk, so that few of them are not full; approximate bytes of text per token."""
_MOST_EMPTY = 100
_BLOCK_ROWS, _BLOCK_BYTES = 256, 1 << 20


@dataclass(frozen=True)
class Made:
    """What chunks are made from: sources, tokenizer and settings of the run. max_length: None keeps every length."""

    sources: list[Source]
    tokenizer: Any
    settings: DataSettings
    max_length: int | None
    packed_length: int | None

    def rows(self) -> RowStream:
        s = self.settings
        seed = s.data_seed if s.is_shuffled else None
        longest = s.stopping_strategy == "all_exhausted"
        return RowStream(self.sources, s.interleave_prob, seed, longest=longest)


@dataclass(frozen=True)
class Chunk:
    """A chunk on disk. start, end: positions in the stream; progress: passes completed at both."""

    number: int
    store: TokenStore
    start: dict[str, Any]
    end: dict[str, Any]
    progress: tuple[float, float]


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:09d}"


def read_chunk(folder: Path, number: int) -> Chunk | None:
    """Chunk `number`, or None if it does not exist yet."""
    store = open_store(chunk_path(folder, number))
    if store is None:
        return None
    place = json.loads((store.path / "place.json").read_text())
    return Chunk(number, store, place["start"], place["end"], tuple(place["progress"]))


class ChunkWriter:
    """Writes the chunks of a stream into a folder, beginning at a position in the stream."""

    def __init__(
        self, made: Made, folder: Path, number: int = 0, place: dict[str, Any] | None = None
    ) -> None:
        """number: of the next chunk. place: its position in the stream; None: the beginning."""
        self._made, self._folder, self.number = made, folder, number
        self._stream = made.rows()
        if place is not None:
            self._stream.seek(place)
        self._empty = 0  # chunks in a row without a sample
        self._pass_is_empty = place is None  # so far; a resumed pass may have had samples before

    def __enter__(self) -> "ChunkWriter":
        made = self._made
        # a size that makes the encoder start its processes at once: a stream is long
        self._encoder = BlocksEncoder(1 << 62, made.tokenizer, made.settings, made.max_length)
        self._submit = self._encoder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._encoder.__exit__(*error)

    def write(self) -> None:
        """Write the next chunk, which appears under its name when it is complete.

        Raises UserError(s) for a row that cannot be used if --strict is true, a whole pass without a usable row, a file
        that cannot be read, and a full disk.
        """
        path = chunk_path(self._folder, self.number)
        temporary = path.with_name(f".{path.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        start, before = self._stream.state(), self._stream.progress()
        report, writer = PartReport(), TokenWriter(temporary)
        ends_pass = self._fill(writer, report)
        report.tokens, report.samples = writer.tokens, writer.samples
        self._refuse_nothing(report, ends_pass)
        place = {"start": start, "end": self._stream.state(), "progress": [before, self._stream.progress()]}
        (temporary / "place.json").write_text(json.dumps(place))
        writer.finish(path.name, None, report.to_json())
        temporary.rename(path)
        self.number += 1

    def _fill(self, writer: TokenWriter, report: PartReport) -> bool:
        """Tokenize the rows of a chunk; returns whether a pass over the data ends with it."""
        waiting: deque[tuple[Path, Any]] = deque()
        problems = Tally()
        at_once = 3 * self._made.settings.dataset_num_proc
        size, ends_pass, block = 0, False, _Block()

        def take() -> None:
            file, future = waiting.popleft()
            result: Encoded = future() if callable(future) else wait_for(future, file)
            report.truncated += result.truncated
            report.learnt_tokens += int((result.weights != 0).sum())
            writer.append(result)
            problems.add(result.problems)

        def send() -> None:
            nonlocal block
            if block.rows:
                waiting.append((block.file, self._submit(block.rows, check_only=False)))
            block = _Block()

        while not ends_pass and not self._is_full(report.rows, size):
            found = self._stream.next()
            ends_pass = found is None
            if found is not None:
                file, row = found
                size += block.add(file, RawRow(report.rows, f"{file}:{row.line}", row.data))
                report.rows += 1
            if ends_pass or len(block.rows) == _BLOCK_ROWS or block.size > _BLOCK_BYTES:
                send()
            while len(waiting) > at_once:
                take()
        send()
        while waiting:
            take()
        self._judge(problems, report)
        return ends_pass

    def _is_full(self, rows: int, size: int) -> bool:
        packed = self._made.packed_length or 0
        enough = (
            rows >= self._made.settings.shuffle_buffer_size and size >= _PACKS * _BYTES_PER_TOKEN * packed
        )
        return enough or size >= LONGEST_CHUNK

    def _judge(self, problems: Tally, report: PartReport) -> None:
        report.dropped, report.examples = dict(problems.counts), problems.examples
        bad = [problem for problem in problems.first if problem.kind not in DROPPED]
        if self._made.settings.strict and bad:
            errors = [UserError(str(problem)) for problem in bad]
            remedy = "fix or remove such rows, or drop --strict true: they are then dropped and counted"
            errors[-1] = UserError(errors[-1].message, remedy)
            raise UserErrors(errors) if len(errors) > 1 else errors[0]

    def _refuse_nothing(self, report: PartReport, ends_pass: bool) -> None:
        """Raise UserError if a whole pass, or a hundred chunks in a row, had no sample."""
        self._empty = 0 if report.samples else self._empty + 1
        self._pass_is_empty &= not report.samples
        ends_empty = ends_pass and self._pass_is_empty
        if ends_pass:
            self._pass_is_empty = True
        if not ends_empty and self._empty < _MOST_EMPTY:
            return
        examples = [text for texts in report.examples.values() for text in texts][:3]
        names = ", ".join(source.spec for source in self._made.sources)
        text = f"--dataset {names}: no row can be used " + ("" if ends_empty else f"in {self._empty} chunks")
        raise UserError(
            "\n  ".join([text.strip(), *examples]),
            "check the columns of the rows, name them with --columns if need be, or raise --max_length",
        )


class _Block:
    """Rows that are tokenized together. size: approximate number of bytes."""

    def __init__(self) -> None:
        self.rows: list[RawRow] = []
        self.size = 0
        self.file = Path()

    def add(self, file: Path, row: RawRow) -> int:
        """Add a row; returns its approximate number of bytes."""
        self.file = file
        self.rows.append(row)
        size = len(row.data) if isinstance(row.data, bytes) else len(str(row.data))
        self.size += size
        return size
