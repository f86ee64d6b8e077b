"""A folder that appears under its name only when it is complete."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from converters.ranks import Ranks
from mcore_swift.errors import DiskFull, UserError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier export that must not stay beside those of a new one."""


IDENTITY = ".attempt.json"
"""In a pending folder: what is being written there, if another attempt may go on with it."""


def pending_folder(final: str | Path) -> Path:
    """The folder in which `pending_directory` writes what becomes `final`."""
    final = Path(os.path.abspath(final))
    return final.parent / f".{final.name}.writing"


def can_continue(pending: Path, identity: dict[str, Any] | None) -> bool:
    """Whether a pending folder was written by an attempt with the same `identity`."""
    if identity is None:
        return False
    try:
        found = json.loads((pending / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == identity


@contextlib.contextmanager
def pending_directory(
    final: str | Path, ranks: Ranks, exist_ok: bool = False, identity: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Give all ranks a temporary folder beside `final`, and rename it to `final` at the end. Collective.

    If any rank raises inside, the folder is removed and every rank raises. A kill leaves a hidden folder
    `.<name>.writing`, which the next attempt removes; but an attempt with the same `identity` continues in it, and then
    Ctrl-C leaves it too. With exist_ok, files in `final` that are not weights are moved into the new folder unless it
    has its own.

    The content is flushed to disk before the folder is renamed.
    Raises UserError if `final` exists and is not empty, unless exist_ok, or if another process is writing it.
    """
    final = Path(os.path.abspath(final))
    pending = pending_folder(final)
    lock: list[int] = []
    ranks.together(lambda: _create(final, pending, exist_ok, identity, lock), where=ranks.is_first)
    error: Exception | None = None
    try:
        try:
            yield pending
        except Exception as raised:  # agreed on, so that no rank waits for one that has left
            error = raised
        ranks.agree(error)
        ranks.together(lambda: _sync_tree(pending), where=_is_first_here(ranks))
        ranks.together(lambda: _rename(final, pending), where=ranks.is_first)
    except BaseException as raised:
        if ranks.is_first and (identity is None or isinstance(raised, Exception)):
            shutil.rmtree(pending, ignore_errors=True)
        raise
    finally:
        _release(lock)


def _create(
    final: Path, pending: Path, exist_ok: bool, identity: dict[str, Any] | None, lock: list[int]
) -> None:
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} exists and is no folder", remedy="choose another --output_dir")
    if final.is_dir() and any(final.iterdir()) and not exist_ok:
        raise UserError(
            f"{final} exists and is not empty", remedy="choose another --output_dir, or add --exist_ok true"
        )
    with disk_errors(pending):
        if pending.is_dir():
            lock.append(_locked(pending))
        if not can_continue(pending, identity):
            shutil.rmtree(pending, ignore_errors=True)
            pending.mkdir(parents=True)
            _release(lock)
            lock.append(_locked(pending))
            if identity is not None:
                partial = pending / f"{IDENTITY}.new"
                partial.write_text(json.dumps(identity), encoding="utf-8")
                partial.replace(pending / IDENTITY)


def _locked(folder: Path) -> int:
    """A descriptor that locks the folder while this process lives. Raises UserError if another process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{folder} is being written by another process",
            remedy="wait until it has ended, or choose another --output_dir",
        ) from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _release(lock: list[int]) -> None:
    while lock:
        os.close(lock.pop())


def _rename(final: Path, pending: Path) -> None:
    with disk_errors(final):
        (pending / IDENTITY).unlink(missing_ok=True)
        if not final.exists():
            pending.rename(final)
            sync(final.parent)
            return
        old = final.parent / f".{final.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        pending.rename(final)
        for entry in old.iterdir():
            weights = any(entry.match(pattern) for pattern in WEIGHT_FILES)
            if not weights and not (final / entry.name).exists():
                entry.rename(final / entry.name)
        sync(final.parent)
        shutil.rmtree(old)


def _is_first_here(ranks: Ranks) -> bool:
    """Whether this is the first process on its machine; it also flushes what the others there wrote."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 if ranks.size > 1 else True


def _sync_tree(folder: Path) -> None:
    """Flush a folder to disk, so that after a power failure its name never exists without its content."""
    found = [Path(place, name) for place, _, names in os.walk(folder) for name in ("", *names)]
    with (
        disk_errors(folder),
        ThreadPoolExecutor(8, "sync") as threads,
    ):  # together: one commit of the file system
        list(threads.map(sync, found))


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # another rank has just finished with it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot say
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
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
