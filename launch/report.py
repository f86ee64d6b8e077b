"""How a worker's failure reaches the user: once, without banners.

A failing worker writes `rank-N.json` into the folder that its launcher named; the launcher decides which of these
was the cause and prints it.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mcore_swift.errors import UserError, UserErrors

FOLDER_VARIABLE = "MCORE_SWIFT_LAUNCH_REPORTS"
"""Environment variable in which a launcher names this folder."""
FAILED = 1
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Report:
    """Why a rank failed. messages: a user's mistakes, one each; trace: traceback of a defect; time: seconds, epoch."""

    rank: int
    kind: Literal["user", "defect"]
    messages: list[str] = field(default_factory=list)
    trace: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Exit:
    """How a worker process ended. code: exit code, or minus the number of the signal that killed it; time: epoch."""

    rank: int
    code: int
    pid: int
    time: float


def report_of(error: BaseException, rank: int) -> Report:
    """The report about an exception that ended a rank."""
    if isinstance(error, UserError):
        return Report(rank, "user", messages=user_messages(error), time=time.time())
    return Report(rank, "defect", trace="".join(traceback.format_exception(error)), time=time.time())


def user_messages(error: UserError) -> list[str]:
    """The mistakes in an error, one message each."""
    return [str(one) for one in error.errors] if isinstance(error, UserErrors) else [str(error)]


def leave_pid(folder: Path) -> None:
    """Leave this worker's process id for the launcher."""
    (folder / f"{os.getpid()}.pid").touch()


def pids(folder: Path) -> Iterator[int]:
    """Process ids that workers left in a launcher's folder."""
    for path in folder.glob("*.pid"):
        yield int(path.stem)


def write(report: Report, folder: Path) -> None:
    """Leave a report for the launcher; the file appears atomically."""
    draft = folder / f".rank-{report.rank}"
    draft.write_text(json.dumps(asdict(report)), encoding="utf-8")
    draft.rename(folder / f"rank-{report.rank}.json")


def read_all(folder: Path) -> list[Report]:
    """The reports of a node's ranks, first failure first."""
    reports = [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: (report.time, report.rank))


def print_user_error(error: UserError, prefix: str = "") -> int:
    """Print a user's mistakes to stderr; returns the matching exit code."""
    _print([f"{prefix}error: {message}" for message in user_messages(error)])
    return error.exit_code


def print_failure(reports: Sequence[Report], exits: Sequence[Exit]) -> int:
    """Print why the workers of a node failed, each message once. Returns the exit code of the run.

    reports: first failure first. exits: of the workers that failed, in the order the launcher saw them.
    A worker killed from outside (kernel, user) is the cause of its peers' broken connections. One that crashed
    (SIGSEGV, SIGABRT) may have done so as a consequence of another's exception, so both are shown.
    """
    # workers that the launcher itself ends, by SIGTERM or later by SIGKILL, end after the first failure
    first = min((one.time for one in exits), default=0.0)
    killed = [one for one in exits if one.code < 0 and one.code != -signal.SIGTERM and one.time <= first + 1]
    if not reports and not killed and exits and exits[0].code < 0:
        killed = [exits[0]]  # someone else's SIGTERM
    user = [report for report in reports if report.kind == "user"]
    if user and reports[0].kind == "user":
        _print(_once(user))
        return UserError.exit_code
    defects = [report for report in reports if report.kind == "defect"]
    lines = [_killed_line(one) for one in killed]
    if defects and all(-one.code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS) for one in killed):
        lines.append(f"error: rank {defects[0].rank} failed:\n{defects[0].trace.rstrip()}")
    if not lines:
        silent = exits[0] if exits else None
        who = f"rank {silent.rank} (pid {silent.pid})" if silent else "a worker"
        lines.append(f"error: {who} left with exit code {silent.code if silent else '?'} and no message")
    _print(lines)
    if killed:
        return 128 - killed[0].code
    return FAILED if defects or not exits else max(FAILED, exits[0].code)


def _once(reports: Sequence[Report]) -> list[str]:
    """Each distinct message, with its ranks unless all messages come from the same ones."""
    ranks: dict[str, list[int]] = {}
    for report in reports:
        for message in report.messages:
            ranks.setdefault(message, []).append(report.rank)
    together = len({tuple(sorted(who)) for who in ranks.values()}) == 1
    lines = []
    for message, who in ranks.items():
        name = "" if together else f" (rank {', '.join(map(str, sorted(who)))})"
        lines.append(f"error{name}: {message}")
    return lines


def _killed_line(one: Exit) -> str:
    number = -one.code
    try:
        name = f" ({signal.Signals(number).name})"
    except ValueError:
        name = ""
    line = (
        f"error: rank {one.rank} (pid {one.pid}) was killed by signal {number}{name}; the others were stopped"
    )
    if number == signal.SIGKILL:
        line += (
            "\n  remedy: if nobody did it, memory ran out (see dmesg): lower --micro_batch_size "
            "(`swift`: --per_device_train_batch_size) or --max_length, use more recomputation or more model parallelism"
        )
    return line


def _print(lines: Sequence[str]) -> None:
    sys.stdout.flush()
    # one write, so that lines of processes sharing the terminal do not mix
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
