"""Running the real command line in processes of its own, as a user does, and looking at how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds for one command on a busy machine; idle the slowest takes about 40


@dataclass(frozen=True)
class Ended:
    """How a command ended. out, err: what it printed."""

    code: int
    out: str
    err: str

    def check(self) -> "Ended":
        """Fail the test unless it succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"
        return self

    def refused(self, *texts: str) -> None:
        """Fail the test unless a user's mistake was told: exit code 2, each text once, no traceback."""
        told = f"exit code {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"
        assert self.code == 2, told
        assert "Traceback" not in self.err + self.out, told
        for text in texts:
            assert self.err.count(text) == 1, f"{text!r} is told {self.err.count(text)} times\n{told}"
        assert self.out == "", told


class Command:
    """`megatron <argv>` running in a session of its own. Use as a context manager: nothing survives it."""

    def __init__(self, argv: list[str], folder: Path, *, processes: int = 1, **env: str) -> None:
        """folder: where it runs, and where what it prints goes. processes: NPROC_PER_NODE."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",  # as many on every machine: sums in one order
            "TOKENIZERS_PARALLELISM": "false",
            **env,
        }
        if processes > 1:
            environment["NPROC_PER_NODE"] = str(processes)
        self._out, self._err = (folder / name for name in ("stdout.txt", "stderr.txt"))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mcore_swift.cli.main", "megatron", *argv],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        for process in [*self._seen.values()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def workers(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that run now."""
        return {rank: process for process in self._look() if (rank := _rank(process)) is not None}

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Fail the test if the command ends, or `LIMIT` passes, before the condition holds."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"the command ended before {what}:\n{self._err.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not happen in {LIMIT} s"
            time.sleep(0.002)

    def wait(self) -> Ended:
        """Wait for the end, which must leave no process behind."""
        try:
            code = self.process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            raise AssertionError(f"still running after {LIMIT} s:\n{self._err.read_text()[-3000:]}") from None
        left = [
            process for process in self._seen.values() if process.is_running() and not _is_zombie(process)
        ]
        assert not left, f"left running: {left}"
        return Ended(code, self._out.read_text(), self._err.read_text())

    def _look(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen |= {process.pid: process for process in found}
        return found


def run(argv: list[str], folder: Path, *, processes: int = 1, **env: str) -> Ended:
    """Run `megatron <argv>` to its end."""
    with Command(argv, folder, processes=processes, **env) as command:
        return command.wait()


def flags(**values: object) -> list[str]:
    """tensor_model_parallel_size=2 -> ["--tensor_model_parallel_size", "2"]; None leaves a flag out."""
    given = {name: value for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", _text(value))]


def steps_logged(run_dir: Path) -> int:
    """The last step in logging.jsonl; 0 before the first."""
    path = run_dir / "logging.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [0]
    for line in lines:
        with suppress(ValueError):  # a line that is being written
            steps.append(json.loads(line)["step"])
    return max(steps)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rank(process: psutil.Process) -> int | None:
    try:
        if "launch.worker" in process.cmdline():
            return int(process.environ()["RANK"])
    except (psutil.Error, KeyError):
        pass  # just started, or just gone
    return None


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_example(script: str, output: Path, *flags: str) -> str:
    """What a script of examples/ prints, which has to succeed; `output` takes the demo and all that it writes."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUTPUT": str(output),
        "MCORE_SWIFT_CACHE": str(output / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{output / 'no-commands'}:/usr/bin:/bin",  # the checkout, whatever else is installed
    }
    command = ["bash", str(REPOSITORY / "examples" / script), *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
    return ended.stdout + ended.stderr
