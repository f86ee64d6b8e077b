"""Start a job of several processes from a test. One job runs many cases, since processes cost more than cases.

A job is a module beside the test, with a function `main(folder)` that calls `run_cases` with its cases. Rank 0 writes
`results.json` (case name -> "" or what went wrong), which `run_job` returns.

Processes are forks of a server that has already imported what they all need, since imports take several times as long
as the rest of a start. The server only imports, so it has no threads that a fork would lack.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

LIMIT_SECONDS = 600
SHOW_SECONDS = 20
GRACE_SECONDS = 20
"""How long the other processes may go on reporting after one has failed."""
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.nn.attention.bias",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "bitsandbytes",
    "peft",
    "pytest",
    "mcore_swift.training.main",
)
"""Imported by the server. Not megatron-core: jobs of the other engine check that they do without it."""

show: Callable[[str], None] = print
"""Shows progress to whoever watches the tests; `tests/conftest.py` makes it reach the terminal."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(IMPORTED))


def run_job(script: Path, world_size: int, folder: Path) -> dict[str, str]:
    """Run `main(folder)` of a script in `world_size` processes over gloo; results by case.

    Fails the test, with the end of every process's output, if a process fails or the job outlasts LIMIT_SECONDS.
    """
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    with _environment_of_the_server():
        forkserver.ensure_running()
    logs = [folder / f"log-{rank}" for rank in range(world_size)]
    processes = [
        _server.Process(
            target=_one_process,
            args=(script, folder, rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log),
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.start()
        ended = _wait(processes, f"{script.stem} in {world_size} processes", logs[0])
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    told = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert ended, f"not finished after {LIMIT_SECONDS} s, exit codes {codes}:\n{told}"
    assert codes == [0] * world_size, f"exit codes {codes}:\n{told}"
    return json.loads((folder / "results.json").read_text())


def assert_all_passed(results: Mapping[str, str]) -> None:
    failed = {name: error for name, error in results.items() if error}
    assert not failed, f"{len(failed)} of {len(results)} cases failed:\n" + "\n".join(
        f"--- {name}\n{error}" for name, error in failed.items()
    )


def run_cases(cases: Mapping[str, Callable[[], None]], folder: Path) -> None:
    """In each process of a job: run the cases in order. Rank 0 writes down which failed on any rank."""
    import torch.distributed as dist

    from mcore_swift.observability import runlog

    runlog.plot_curves = lambda *_: []  # plotting takes as long as training such models; tests/e2e covers it
    results = {}
    for number, (name, case) in enumerate(cases.items(), start=1):
        error, started = "", time.monotonic()
        print(f"case {number} of {len(cases)}: {name}", flush=True)
        try:
            case()
        except Exception:
            error = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        errors: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        results[name] = next((text for text in errors if text), "")
        print(f"{name}: {time.monotonic() - started:.2f} s", flush=True)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _environment_of_the_server() -> Iterator[None]:
    """Set variables that must be set before torch is imported, or that apply to all jobs; restore them afterwards."""
    before = dict(os.environ)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "ignore",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_process(script: Path, folder: Path, environment: dict[str, str], log: Path) -> None:
    """What one process of a job does. It exits without finalising the interpreter, as such forks do: threads of torch
    and gloo that are still running then could abort it."""
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.path.insert(0, str(script.parent))
    importlib.import_module(script.stem).main(folder)


def _wait(processes: Sequence[BaseProcess], name: str, log: Path) -> bool:
    """Wait until all have ended, or one has failed and GRACE_SECONDS are over. False after LIMIT_SECONDS."""
    begun = time.monotonic()
    deadline, shown = begun + LIMIT_SECONDS, begun
    while running := [process for process in processes if process.exitcode is None]:
        now = time.monotonic()
        if now > deadline:
            return any(process.exitcode for process in processes)
        if any(process.exitcode for process in processes):
            deadline = min(deadline, now + GRACE_SECONDS)
        if now - shown > SHOW_SECONDS:
            shown = now
            show(f"\n{name}, {now - begun:.0f} s: {_last_case(log)}")
        connection.wait([process.sentinel for process in running], timeout=1)
    return True


def _last_case(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if line.startswith("case ")), "starting")
