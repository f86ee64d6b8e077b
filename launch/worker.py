"""One started process: `python -m launch.worker module:function argv...`.

A module with a `__main__` guard, since the work inside starts processes of its own (checkpoint writers, data
loaders) that import the main module again.
"""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import report
from .run import call, end_this_process_soon

REPORTS_VARIABLE = "MCORE_SWIFT_LAUNCH_REPORTS"
_PR_SET_PDEATHSIG = 1


def main(target: str, argv: list[str]) -> int:
    """Run the target as this rank and leave a report if it fails. Returns the exit code."""
    rank, folder = int(os.environ["RANK"]), Path(os.environ.pop(REPORTS_VARIABLE))
    _end_with_parent()
    faulthandler.enable()
    with suppress(OSError):
        (folder / f"{os.getpid()}.pid").touch()
    try:
        return call(target, argv)
    except KeyboardInterrupt:
        return report.INTERRUPTED
    except Exception as error:
        made = report.report_of(error, rank)
        report.write(made, folder)
        code = getattr(error, "exit_code", report.FAILED) if made.kind == "user" else report.FAILED
        end_this_process_soon(code)
        return code


def pids(folder: Path) -> Iterator[int]:
    """Process ids of the workers that left their mark in a launcher's folder."""
    for path in folder.glob("*.pid"):
        yield int(path.stem)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies, however that happens. Nothing elsewhere."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before we asked
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
