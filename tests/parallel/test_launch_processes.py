"""`launch.run` with real processes over gloo: exit codes, one message, no process left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.environment import free_port

REPOSITORY = Path(__file__).parents[2]
LIMIT = 180  # seconds for a run of two processes on a busy machine; idle it takes under 10

WORK = """
import multiprocessing, os, signal, sys, time
from pathlib import Path


def child():
    time.sleep(600)


def work(argv):
    import torch
    import torch.distributed as dist
    from mcore_swift.errors import UserError

    how, folder = argv[0], Path(argv[1])
    dist.init_process_group("gloo")
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    rank = dist.get_rank()
    if rank == 0:
        threads = os.environ.get("OMP_NUM_THREADS")
        print("sum", int(total), "of", dist.get_world_size(), "threads", threads, flush=True)
    if how == "user":
        raise UserError("data.jsonl:7 is no JSON", "mend the line")
    if how == "user-on-1" and rank == 1:
        raise UserError("data.jsonl:7 is no JSON", "mend the line")
    if how == "defect-on-1" and rank == 1:
        raise RuntimeError("a defect of ours")
    if how in ("kill-1", "sleep"):
        # a process of the worker's own, as checkpoint writers and data loaders are
        helper = multiprocessing.get_context("spawn").Process(target=child, daemon=True)
        helper.start()
        (folder / f"{os.getpid()}.pid").touch()
        (folder / f"{helper.pid}.pid").touch()
        dist.barrier()
    if how == "kill-1" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleep":
        (folder / f"ready-{rank}").touch()
        time.sleep(600)
    if how == "code":
        return 5 if rank == 1 else 0
    dist.barrier()
    dist.destroy_process_group()
"""
MAIN = """
import sys
import launch

if __name__ == "__main__":
    code = launch.run("sft", sys.argv[1:], "launched_work:work")
    sys.exit(code)
"""


class Started:
    """A command under test, with everything it leaves to look at."""

    def __init__(self, folder: Path, how: str, env: dict[str, str], prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        (folder / "launched_work.py").write_text(WORK)
        (folder / "main.py").write_text(MAIN)
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "NNODES")
        clean = {name: value for name, value in os.environ.items() if name not in own}
        clean["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(folder)])
        command = [*(prefix or (sys.executable,)), str(folder / "main.py"), how, str(folder)]
        self.process = subprocess.Popen(
            command,
            env=clean | env,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, err

    def wait_until_ready(self, ranks: int) -> None:
        end = time.monotonic() + LIMIT
        while not all((self.folder / f"ready-{rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < end, "the workers did not get ready"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)

    def left_behind(self, seconds: float = 20) -> list[int]:
        """Processes that still run after a while, of those that the workers noted."""
        noted = [int(path.stem) for path in self.folder.glob("*.pid")]
        assert noted
        end = time.monotonic() + seconds
        while True:
            left = [pid for pid in noted if _runs(pid)]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    started: list[Started] = []

    def begin(how: str, folder: str = "run", prefix: tuple[str, ...] = (), **env: str) -> Started:
        path = tmp_path / folder
        path.mkdir()
        started.append(Started(path, how, env, prefix))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()
        for path in one.folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL)


def test_two_processes_do_the_work(start) -> None:
    code, out, err = start("ok", NPROC_PER_NODE="2").finish()
    assert (code, err) == (0, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out == f"sum 3 of 2 threads {threads}\n"


def test_a_users_mistake_is_printed_once(start) -> None:
    runs = [start(how, folder=how, NPROC_PER_NODE="2") for how in ("user", "user-on-1")]
    for run in runs:
        code, _, err = run.finish()
        assert (code, err) == (2, "error: data.jsonl:7 is no JSON\n  remedy: mend the line\n")


def test_a_defect_shows_its_traceback_once_with_its_rank(start) -> None:
    code, _, err = start("defect-on-1", NPROC_PER_NODE="2").finish()
    assert code == 1
    assert err.startswith("error: rank 1 failed:\nTraceback")
    assert err.count("RuntimeError: a defect of ours") == 1
    assert "ChildFailedError" not in err and "Connection closed" not in err


def test_exit_code_of_the_work(start) -> None:
    code, _, err = start("code", NPROC_PER_NODE="2").finish()
    assert code == 5 and "rank 1" in err and "exit code 5" in err


def test_a_killed_worker_is_named_and_leaves_nothing(start) -> None:
    run = start("kill-1", NPROC_PER_NODE="2")
    code, _, err = run.finish()
    assert code == 128 + signal.SIGKILL
    assert err.count("was killed by signal 9 (SIGKILL)") == 1 and err.startswith("error: rank 1 (pid ")
    assert "Traceback" not in err
    assert run.left_behind() == []


def test_a_stopped_launcher_stops_its_workers(start) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    runs = {number: start("sleep", folder=number.name, NPROC_PER_NODE="2") for number in numbers}
    for number, run in runs.items():
        run.wait_until_ready(2)
        run.process.send_signal(number)
        code, _, err = run.finish()
        assert code == 128 + number, err
        assert f"sft: stopped by {number.name}" in err and "Traceback" not in err
        assert run.left_behind() == []


def test_workers_do_not_outlive_a_killed_launcher(start) -> None:
    run = start("sleep", NPROC_PER_NODE="2")
    run.wait_until_ready(2)
    run.process.kill()
    run.finish()
    assert run.left_behind() == []


def test_two_nodes(start) -> None:
    """Two launchers on one machine, as on two nodes."""
    from launch.environment import free_port

    shared = {
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    nodes = [start("ok", folder=f"node-{rank}", NODE_RANK=str(rank), **shared) for rank in (0, 1)]
    results = [node.finish() for node in nodes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert [out.startswith("sum 3 of 2") for _, out, _ in results] == [True, False]


def test_a_port_that_is_taken(start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = start("ok", NPROC_PER_NODE="2", MASTER_PORT=port).finish()
    assert code == 2 and f"MASTER_PORT={port} is in use" in err and "Traceback" not in err


def test_under_torchrun_it_joins_and_rank_zero_speaks(start) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    code, out, _ = start("ok", folder="ok", prefix=torchrun, NPROC_PER_NODE="2").finish()
    assert code == 0 and out.startswith("sum 3 of 2")
    code, _, err = start("user", folder="bad", prefix=torchrun).finish()
    assert code != 0  # torchrun's own code
    assert err.count("[rank 0] error: data.jsonl:7 is no JSON") == 1 and "[rank 1] error" not in err


def test_under_srun_it_joins(start) -> None:
    """Two processes with what srun sets for its tasks."""
    step = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1"}
    step["MASTER_PORT"] = str(free_port())
    tasks = [
        start("user-on-1", folder=f"task-{rank}", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **step)
        for rank in (0, 1)
    ]
    (_, out, _), (code, _, err) = [task.finish() for task in tasks]
    assert out.startswith("sum 3 of 2")
    assert code == 2 and err.count("[rank 1] error: data.jsonl:7 is no JSON") == 1
