"""`--dataset path#N`: which files a source consists of. Standard library only.

A source is files of rows, or one dataset that was tokenized for Megatron (`.bin` and `.idx`, see `indexed`).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
INDEX = ".idx"
_SAMPLE = re.compile(r"^(?P<path>.*)#(?P<count>[0-9][0-9_]*)$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# files of a dataset repository that describe the data and contain none
_NOT_ROWS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "configuration.json",
}


@dataclass(frozen=True)
class Source:
    """One `--dataset` value: its files in the order of reading, and the number of rows to take (None: all)."""

    spec: str
    files: tuple[Path, ...]
    take: int | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether it contains token ids instead of rows; `files` is then its single .idx."""
        return self.files[0].suffix == INDEX


def parse_source(spec: str, flag: str = "--dataset") -> Source:
    """Find the files that `spec` names: a file or a folder, either with `#N`.

    Raises UserError for a missing path, a hub id, an unknown extension, a folder without data, and `#0`.
    """
    path, take = Path(spec).expanduser(), None
    if not path.exists() and not _index_of(path) and (match := _SAMPLE.match(spec)):
        path, take = Path(match["path"]).expanduser(), int(match["count"])
    if take == 0:
        raise UserError(
            f"{flag} {spec} takes no row", "give #N with N of 1 or more, or leave #N away for all rows"
        )
    if index := _index_of(path):
        return Source(spec, (index,), take)
    if not path.exists():
        raise _missing(str(path), flag, spec)
    if path.is_dir():
        return Source(spec, _files_of(path, flag), take)
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(
            f"{flag} {path}: the extension {path.suffix or '(none)'} is unknown",
            f"known are {', '.join(EXTENSIONS)}, and .bin with .idx" + _decompress(path),
        )
    return Source(spec, (path,), take)


def _index_of(path: Path) -> Path | None:
    """The .idx of the indexed dataset that `path` names by one of its two files or by their prefix; None if none."""
    if path.suffix.lower() in (INDEX, ".bin"):
        return path.with_suffix(INDEX)
    if not path.exists() and any(path.with_name(path.name + end).is_file() for end in (INDEX, ".bin")):
        return path.with_name(path.name + INDEX)
    return None


def parse_sources(specs: tuple[str, ...], flag: str = "--dataset") -> tuple[list[Source], list[UserError]]:
    """The sources that can be found, and an error for each that cannot."""
    sources, errors = [], []
    for spec in specs:
        try:
            sources.append(parse_source(spec, flag))
        except UserError as error:
            errors.append(error)
    return sources, errors


def _missing(path: str, flag: str, spec: str) -> UserError:
    hub, _, rest = spec.partition("::")
    bare = rest if hub in ("hf", "ms") else path.split(":")[0]
    if hub in ("hf", "ms") or (_HUB_ID.match(bare) and not bare.lower().endswith(EXTENSIONS)):
        return UserError(
            f"{flag} {spec}: no such path, and datasets of a hub are not fetched yet: only local paths are read",
            f"download it first (`hf download --repo-type dataset {bare.split('#')[0]} --local-dir DIR`) "
            f"and give {flag} DIR",
        )
    near = _near(Path(path))
    return UserError(
        f"{flag} {path}: no such file or folder", f"did you mean {near}?" if near else "check the path"
    )


def _near(path: Path) -> str | None:
    import difflib

    if not path.parent.is_dir():
        return None
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in EXTENSIONS or p.is_dir()]
    found = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / found[0]) if found else None


def _decompress(path: Path) -> str:
    return "; decompress it first" if path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""


def _files_of(folder: Path, flag: str) -> tuple[Path, ...]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
        and path.name not in _NOT_ROWS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        remedy = f"known files are {', '.join(EXTENSIONS)}"
        if any(folder.rglob("*.arrow")):
            remedy = "this is a saved `datasets` folder (arrow): write it with `.to_parquet(...)` first"
        raise UserError(f"{flag} {folder}: the folder holds no file of rows", remedy)
    return tuple(found)
