"""One builder at a time: a lock file that the system releases when its holder dies."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def lock(path: Path, limit: float, what: str) -> Iterator[None]:
    """Hold the lock `path`. Waits up to `limit` seconds; every half minute it logs what it waits for (`what`).

    Raises UserError, which names the holder, when the time is up.
    """
    with path.open("a+") as file:
        start, told = time.monotonic(), 0.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - start
                file.seek(0)
                holder = file.read().strip() or "another process"
                if waited > limit:
                    raise UserError(
                        f"waited {waited:.0f} s for {holder}, which holds {path}: {what}",
                        "wait until it is done and start again, or stop it; or give this run its own --cache_dir",
                    ) from None
                if waited - told >= 30 or told == 0:
                    logger.warning("waiting for %s: %s", holder, what)
                    told = waited or 1e-9
                time.sleep(min(0.2, limit / 10 + 0.01))
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)
