"""A folder that appears under its name only when it is complete."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.ranks import Ranks
from mcore_swift.errors import UserError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier export that must not stay beside those of a new one."""


@contextlib.contextmanager
def pending_directory(final: str | Path, ranks: Ranks, exist_ok: bool = False) -> Iterator[Path]:
    """Gives all ranks a temporary folder beside `final`, and renames it to `final` at the end. Collective.

    If any rank raises inside, the folder is removed and every rank raises. A kill leaves only a hidden
    folder `.<name>.writing`, which the next attempt removes. With exist_ok, files that `final` already holds
    and that are not weights move into the new folder unless it has its own.

    Raises UserError if `final` exists and holds something, unless exist_ok.
    """
    final = Path(os.path.abspath(final))
    pending = final.parent / f".{final.name}.writing"
    ranks.agree(_try(_create, final, pending, exist_ok) if ranks.is_first else None)
    error: Exception | None = None
    try:
        try:
            yield pending
        except Exception as raised:  # agreed on, so that no rank waits for one that has left
            error = raised
        ranks.agree(error)
        ranks.agree(_try(_rename, final, pending) if ranks.is_first else None)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(pending, ignore_errors=True)
        raise


def _try(action, *arguments) -> Exception | None:
    try:
        action(*arguments)
    except Exception as error:
        return error
    return None


def _create(final: Path, pending: Path, exist_ok: bool) -> None:
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} exists and is no folder", remedy="choose another --output_dir")
    if final.is_dir() and any(final.iterdir()) and not exist_ok:
        raise UserError(
            f"{final} exists and is not empty", remedy="choose another --output_dir, or add --exist_ok true"
        )
    with disk_errors(pending):
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)


def _rename(final: Path, pending: Path) -> None:
    with disk_errors(final):
        if not final.exists():
            pending.rename(final)
            return
        old = final.parent / f".{final.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        pending.rename(final)
        for entry in old.iterdir():
            weights = any(entry.match(pattern) for pattern in WEIGHT_FILES)
            if not weights and not (final / entry.name).exists():
                entry.rename(final / entry.name)
        shutil.rmtree(old)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left for {path}", remedy="free space, or choose an --output_dir on another disk"
            ) from None
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", remedy="check the path and its permissions"
        ) from None


def check_free_space(folder: Path, nbytes: int) -> None:
    """Raise UserError if `nbytes` do not fit on the disk of `folder`, before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the output needs {nbytes / 1e9:.1f} GB",
            remedy="free space, or choose an --output_dir on another disk",
        )
