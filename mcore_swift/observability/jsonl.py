"""logging.jsonl: one JSON object per log line, one clean curve even after crashes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from .meter import Line

FILE_NAME = "logging.jsonl"


class JsonlLogger:
    """Appends log lines to `folder`/logging.jsonl, each written out at once.

    start_step: the step resumed from. Rows of later steps, which a crashed run wrote and this run will write
    again, are removed first. Raises UserError when the file cannot be read or written.
    """

    def __init__(self, folder: str | Path, *, start_step: int = 0) -> None:
        self.path = Path(folder) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            truncate_after(self.path, start_step)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise _no_write(self.path, error) from None

    def after_step(self, step: int) -> None:
        pass

    def log(self, line: Line) -> None:
        """Append a line. Raises UserError when the file cannot be written, for example on a full disk."""
        row = {name: _plain(value) for name, value in line.items()}
        try:
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise _no_write(self.path, error) from None

    def close(self) -> None:
        self._file.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log file in order. A last line that a crash has cut short is left out.

    Raises UserError when the file cannot be read or another line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: is no JSON", "mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: is no JSON object", "mend or remove the line")
        rows.append(row)
    return rows


def truncate_after(path: Path, step: int) -> int:
    """Remove the rows of steps after `step`; returns how many. The file is replaced atomically."""
    if not path.exists():
        return 0
    rows = read_rows(path)
    kept = [row for row in rows if step_of(row) <= step]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    if path.read_text(encoding="utf-8") != text:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return len(rows) - len(kept)


def step_of(row: dict[str, Any]) -> int:
    """The step of a row of ours or of ms-swift's; 0 for a row without one, such as a summary."""
    if isinstance(row.get("step"), int):
        return row["step"]
    for name in ("iteration", "global_step/max_steps"):
        step, _, _ = str(row.get(name, "")).partition("/")
        if step.isdigit():
            return int(step)
    return 0


def _plain(value: Any) -> Any:
    """NaN and infinities as text, since JSON cannot represent them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _no_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written: {error.strerror}", "free some space or choose another --output_dir"
    )
