"""Starting a job of several processes from a test: one job runs many cases, since imports cost more than cases.

A job is a script beside the test. It calls `run_cases` with its cases; rank 0 leaves `results.json`, case name ->
"" or what went wrong, which `run_job` returns.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

LIMIT_SECONDS = 900


def run_job(script: Path, world_size: int, folder: Path) -> dict[str, str]:
    """Run `script folder` in `world_size` processes over gloo; results by case.

    Fails the test, with the end of every process's output, if a process fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
            "PYTHONWARNINGS": "ignore",
        }
        log = (folder / f"log-{rank}").open("w")
        command = [sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs
    return json.loads((folder / "results.json").read_text())


def assert_all_passed(results: Mapping[str, str]) -> None:
    failed = {name: error for name, error in results.items() if error}
    assert not failed, f"{len(failed)} of {len(results)} cases failed:\n" + "\n".join(
        f"--- {name}\n{error}" for name, error in failed.items()
    )


def run_cases(cases: Mapping[str, Callable[[], None]], folder: Path) -> None:
    """In each process of a job: run the cases in order and write down on rank 0 which failed on any rank."""
    import torch.distributed as dist

    from mcore_swift.observability import runlog

    runlog.plot_curves = lambda *_: []  # it takes as long as training such models; tests/e2e has the images
    results = {}
    for name, case in cases.items():
        error, started = "", time.monotonic()
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
    atexit.register(_leave)


def _leave() -> None:
    """End without taking the interpreter apart: threads of torch and gloo that still run then can abort a process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1 if getattr(sys, "last_value", None) else 0)
