"""Stream the rows of a file, each with its place. Standard library only, except pyarrow for parquet.

A reader never holds more than a block of rows. Lines of JSON are passed on unparsed (`bytes`), so that they are
parsed in the processes that tokenize, and a broken line affects only its own row.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .problems import RowError
from .sources import INDEX

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row and its place: `line` counts lines from 1 (parquet: rows).

    data: the row, an unparsed line of JSON, or the error in the row.
    """

    line: int
    data: dict[str, Any] | bytes | RowError


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of `path` in order. Raises UserError if the file itself cannot be read."""
    reader = _READERS[path.suffix.lower()]
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from None


class Place(NamedTuple):
    """The position of the next row in a file: rows before it; in line-based formats also bytes and lines before it."""

    row: int = 0
    offset: int = 0
    line: int = 0


def read_rows_from(path: Path, start: Place = Place()) -> Iterator[tuple[Row, Place]]:  # noqa: B008
    """The rows of `path` from a place on, each with the place after it. Raises UserError as `read_rows` does.

    Line-based formats are seeked, parquet skips row groups; other formats are read from their beginning.
    """
    if path.suffix.lower() in (".jsonl", ".txt"):
        yield from _read_lines_from(path, start)
        return
    first, rows = 0, read_rows(path)
    if path.suffix.lower() == ".parquet":
        first, rows = _row_groups_from(path, start.row)
    for number, row in enumerate(rows, first + 1):
        if number > start.row:
            yield row, Place(number)


def _read_lines_from(path: Path, start: Place) -> Iterator[tuple[Row, Place]]:
    is_text = path.suffix.lower() == ".txt"
    number, offset, line = start
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for raw in file:
                offset, line = offset + len(raw), line + 1
                data = (raw.removeprefix(_BOM) if line == 1 else raw).strip()
                if data:
                    number += 1
                    yield Row(line, {"text": data.decode()} if is_text else data), Place(number, offset, line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: is not UTF-8 text ({error.reason})", "save it as UTF-8") from None


def _row_groups_from(path: Path, row: int) -> tuple[int, Iterator[Row]]:
    """(number of rows before, rows), starting with the row group that holds `row`."""
    metadata = _parquet(path).metadata
    first, group = 0, 0
    while group < metadata.num_row_groups and first + metadata.row_group(group).num_rows <= row:
        first += metadata.row_group(group).num_rows
        group += 1
    return first, _read_parquet(path, range(group, metadata.num_row_groups), first)


def parse_row(data: dict[str, Any] | bytes | RowError) -> dict[str, Any]:
    """The row as a dict. Raises RowError for a line that is not a JSON object."""
    if isinstance(data, dict):
        return data
    if isinstance(data, RowError):
        raise data
    try:
        row = json.loads(data)
    except json.JSONDecodeError as error:
        raise RowError("not JSON", f"not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"not UTF-8 text (byte {error.start} of the line)") from None
    if not isinstance(row, dict):
        raise RowError("not an object", f"a row is an object {{...}}, this is {_kind(row)}")
    return row


def count_rows(path: Path) -> int:
    """Number of rows that `read_rows` gives (indexed datasets: documents), found in the format's cheapest way."""
    if path.suffix == INDEX:
        from .indexed import IndexedTokens

        return len(IndexedTokens(path))
    if path.suffix.lower() == ".parquet":
        return _parquet(path).metadata.num_rows
    return sum(1 for _ in read_rows(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line := line.strip():
                yield number, line


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield Row(number, line)


def _read_txt(path: Path) -> Iterator[Row]:
    """Each line is a document; blank lines are skipped."""
    for number, line in _lines(path):
        yield Row(number, {"text": line.decode("utf-8")})


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object per line."""
    first = next(_lines(path), None)
    if first is None:
        return
    if not first[1].startswith(b"["):
        yield from _read_jsonl(path) if _is_object(first[1]) else _read_values(path, in_array=False)
    else:
        yield from _read_values(path, in_array=True)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class _Text:
    """A window over a text file that knows its line number, for decoding JSON values one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open(encoding="utf-8-sig")
        self.text, self.at = "", 0
        self._line, self._counted = 1, 0  # line of text[_counted]

    def more(self) -> bool:
        """Read another block, at least as long as the unread text; False at the end of the file."""
        self.here()
        rest = self.text[self.at :]
        block = self._file.read(max(_BLOCK, len(rest)))
        self.text, self.at, self._counted = rest + block, 0, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self, decoder: json.JSONDecoder) -> Any:
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                inside = error.pos - self.at
                if self.more():  # the value may only be cut off by the end of the window
                    continue
                raise self.error(error.msg, inside) from None
            self.at = end
            return value

    def here(self) -> int:
        """Line of the next character, counted from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def error(self, message: str, ahead: int = 0) -> UserError:
        line = self.here() + self.text.count("\n", self.at, self.at + ahead)
        return UserError(
            f"{self._path}:{line}: not JSON: {message}",
            "a .json file is an array of rows, [{...}, {...}], or one row {...} a line",
        )

    def close(self) -> None:
        self._file.close()


def _read_values(path: Path, in_array: bool) -> Iterator[Row]:
    decoder, text = json.JSONDecoder(), _Text(path)
    try:
        if in_array:
            text.peek()
            text.at += 1
        while (char := text.peek()) not in ("", "]"):
            line = text.here()
            row = text.value(decoder)
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line}: a row is an object {{...}}, this is {_kind(row)}")
            yield Row(line, row)
            char = text.peek()
            if char == "," and in_array:
                text.at += 1
            elif in_array and char != "]":
                raise text.error(
                    "expected ',' or ']' after a row" if char else "the file ends within the array"
                )
        if in_array and char != "]":
            raise text.error("the file ends within the array")
    finally:
        text.close()


def _read_csv(path: Path) -> Iterator[Row]:
    """The first line names the columns. Every value stays text: a guessed type would turn "007" into 7."""
    limit = csv.field_size_limit(
        sys.maxsize
    )  # long documents are normal here; the limit is global to the process, so it is restored
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header is None:
                return
            end = reader.line_num
            for values in reader:
                line, end = end + 1, reader.line_num
                if not values:
                    continue
                if len(values) == len(header):
                    yield Row(line, dict(zip(header, values, strict=True)))
                else:
                    message = (
                        f"{len(values)} values under {len(header)} columns (quote a value that has a comma)"
                    )
                    yield Row(line, RowError("wrong number of values", message))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file: {error}") from None


def _read_parquet(path: Path, groups: range | None = None, number: int = 0) -> Iterator[Row]:
    """groups: row groups to read; None: all. number: rows before them."""
    for batch in _parquet(path).iter_batches(batch_size=1024, row_groups=groups and list(groups)):
        for row in batch.to_pylist():
            number += 1
            yield Row(number, row)


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
