"""Starting the measured programs, and describing the machine."""

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# On SIGTERM, a benchmark ends the processes that it has started, as on Ctrl-C.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def machine(*packages: str) -> str:
    """The machine, its current load (results under load are less reliable), and versions of packages."""
    versions = "".join(f", {name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}{versions}"


@contextmanager
def on_this_machine(*packages: str, folder: Path | None = None) -> Iterator[None]:
    """Print the machine before and after a benchmark, and remove the folder it works in."""
    print(machine(*packages), flush=True)
    try:
        yield
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    print(machine())


def spread(values: Sequence[float], form: str) -> str:
    """Median, extremes and number of the values: `1.02 (0.99 to 1.03 in 5)`."""
    return (
        f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}} in {len(values)})"
    )


def program(name: str, *arguments: object) -> list[str]:
    """The command line of `megatron ...` or `swift ...`, using the script next to this interpreter or the module."""
    script = Path(sys.executable).with_name(name)
    start = [str(script)] if script.exists() else [sys.executable, "-m", "mcore_swift.cli.main", name]
    return [*start, *map(str, arguments)]


def flags(**values: object) -> list[str]:
    """`--name value` for each."""
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def environment(**values: str) -> dict[str, str]:
    """This process's environment updated with `values`, so that a child imports this checkout and stays offline.

    Python may write compiled files, as by default, so that imports are not compiled every time.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    own |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return own | values


def stamped_lines(
    command: Sequence[str], *, limit_s: float, peaks: list[int] | None = None, **env: str
) -> Iterator[tuple[float, str]]:
    """Run a command; yields (seconds since its start, line) for each line that it prints.

    peaks: the peak resident memory of the process in bytes is appended to it at the end.
    Raises RuntimeError, with the last output, if the command fails or takes longer than `limit_s` seconds.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment(PYTHONUNBUFFERED="1", **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the processes it starts can be ended with it
    )
    timer = threading.Timer(limit_s, end, [process])
    timer.start()
    lines: list[str] = []
    try:
        for line in process.stdout:
            yield time.perf_counter() - started, line.rstrip("\n")
            lines.append(line)
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if peaks is not None:
            peaks.append(usage.ru_maxrss * 1024)
    finally:
        timed_out = not timer.is_alive()
        timer.cancel()
        end(process)
    if code:
        why = f"did not end within {limit_s:.0f} s" if timed_out else f"ended with exit code {code}"
        raise RuntimeError(f"{' '.join(command)}\n{why}:\n{''.join(lines[-30:])}")


def end(process: subprocess.Popen) -> None:
    """Kill a process if it is still running, with its children if it leads a session."""
    if process.poll() is None:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def run_ranks(command: Sequence[str], processes: int, *, threads: int | None = None, limit_s: float) -> str:
    """Run a command in `processes` processes set up for torch.distributed; returns the output of rank 0.

    threads: per process; None divides the cores evenly. Raises RuntimeError if a process fails or takes longer than
    `limit_s` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own_threads = str(threads or max(1, os.cpu_count() // processes))
    started = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS=own_threads, **common),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    deadline = time.monotonic() + limit_s
    try:
        output = started[0].communicate(timeout=limit_s)[0]
        codes = [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}\ndid not end within {limit_s:.0f} s") from None
    finally:
        for process in started:
            end(process)
    if any(codes):
        raise RuntimeError(f"{' '.join(command)}\nended with exit codes {codes}:\n{output[-3000:]}")
    return output
