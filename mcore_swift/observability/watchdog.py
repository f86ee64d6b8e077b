"""A limit on how long a phase may take, so that a hang ends with the phase's name and stacks, not in silence."""

import faulthandler
import os
import sys
import threading


class Limit:
    """Ends the process when a block takes longer than its limit.

        with Limit("save of checkpoint-500", seconds=1800):
            save()

    When the time is up, standard error gets one line with the phase and the rank, then the Python stack of
    every thread, and the process exits with code 1 at once, so that the launcher ends the others too. Nothing
    is cleaned up: a hanging collective cannot be interrupted. Limits may nest and run in several threads.
    Code that never releases the GIL escapes, since the limit is a thread like any other; waiting in
    torch.distributed, for files and for queues releases it.

    Raises ValueError when `seconds` is not positive: every wait has a limit.
    """

    EXIT_CODE = 1

    def __init__(self, name: str, seconds: float, *, remedy: str = "", rank: int | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"the limit of {name} must be positive, not {seconds}")
        self.name = name
        self.seconds = seconds
        self.remedy = remedy
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Limit":
        # the platform caps a timer's wait at about 292 years; a longer one would fail
        self._timer = threading.Timer(min(self.seconds, threading.TIMEOUT_MAX), self._expire)
        self._timer.daemon = True
        self._timer.name = f"limit of {self.name}"
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def message(self) -> str:
        text = (
            f"rank {self.rank}: {self.name} did not finish within {self.seconds:g} s; stopping this process"
        )
        return f"{text}\n  remedy: {self.remedy}" if self.remedy else text

    def _expire(self) -> None:
        # the original standard error: faulthandler needs a file descriptor, which a replacement may lack
        stream = sys.__stderr__ or sys.stderr
        try:
            print(self.message(), file=stream, flush=True)
            faulthandler.dump_traceback(file=stream, all_threads=True)
            stream.flush()
        finally:
            os._exit(self.EXIT_CODE)
