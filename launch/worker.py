"""One started process: `python -m launch.worker module:function argv...`.

It needs its `__main__` guard: the work inside starts processes of its own (checkpoint writers, data loaders) that
import the main module again.
"""

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from . import report
from .run import call, end_this_process_soon

PARENT_CHECK_SECONDS = 1.0


def main(target: str, argv: list[str]) -> int:
    """Run the target as this rank and leave a report if it fails. Returns the exit code."""
    rank, folder = int(os.environ["RANK"]), Path(os.environ.pop(report.FOLDER_VARIABLE))
    _end_with_parent()
    faulthandler.enable()
    with suppress(OSError):
        report.leave_pid(folder)
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


def _end_with_parent() -> None:
    """End this process and those it has started soon after its launcher dies, for whatever reason.

    This uses a thread, since the kernel's parent-death signal would not reach the children of this process.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(PARENT_CHECK_SECONDS)
        if os.getpgrp() == os.getpid():  # the elastic launcher makes each worker the leader of its group
            os.killpg(0, signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


def _leave(code: int) -> NoReturn:
    """Exit as Python does, but without finalising the interpreter: during that, threads of torch or gloo that are
    still running can abort a process whose own work is done, and so fail the run."""
    threading._shutdown()  # waits for non-daemon threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1], sys.argv[2:]))
