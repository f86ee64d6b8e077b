"""`run`: do a command's work in this process, or in the processes that the environment asks for."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from mcore_swift.errors import UserError

from . import report
from .environment import Place, read_place, usable_cores

Target = str | Callable[[list[str]], int | None]

RANK_ZERO_FIRST_SECONDS = 3.0
LEAVE_SECONDS = 30.0


def run(command: str, argv: Sequence[str], target: Target) -> int:
    """Do the work of a command and return the exit code: 0, 2 for a user's mistake, 1 for a defect.

    command: its name, for messages. target: a function of argv, or its location as 'module:function' (which keeps
    its imports out of a process that only starts others). It runs on every rank with RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, parses argv itself, and returns None or an exit code; its
    exceptions are printed here, once for all ranks. If a signal kills a worker, the exit code is 128 + the signal's
    number. The environment is restored afterwards.
    """
    try:
        place = read_place()
    except UserError as error:
        return report.print_user_error(error)
    with _restored_environment():
        # megatron-core relies on kernels starting in launch order; only CUDA reads this
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if place.processes_here > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(place.processes_here)))
        if place.mode == "start":
            from .start import start

            return start(place, command, list(argv), name_of(target))
        os.environ.update(place.as_environment())
        return _run_here(place, list(argv), target)


def threads_per_process(processes: int) -> int:
    """CPU threads for each of a node's processes: SLURM's number, else an equal share of the cores, at least 1."""
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdigit():
        return max(1, int(per_task))
    return max(1, usable_cores() // processes)


def name_of(target: Target) -> str:
    """'module:function' of a target, so that another process can import it. Raises ValueError if it could not."""
    if isinstance(target, str):
        return target
    module, name = target.__module__, target.__qualname__
    if module == "__main__" or "<" in name:
        raise ValueError(f"{module}:{name} cannot be imported by a worker: put it at the top of a module")
    return f"{module}:{name}"


def call(target: Target, argv: list[str]) -> int:
    """Run a target and return its exit code. Its exceptions pass through."""
    if isinstance(target, str):
        module, _, name = target.partition(":")
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    else:
        function = target
    return function(argv) or 0


def _run_here(place: Place, argv: list[str], target: Target) -> int:
    try:
        return call(target, argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return report.INTERRUPTED
    except Exception as error:
        if place.mode == "joined":
            return _fail_joined(place, error)
        if isinstance(error, UserError):
            return report.print_user_error(error)
        traceback.print_exc()
        return report.FAILED


def _fail_joined(place: Place, error: Exception) -> int:
    """Report the failure of a process that another program started.

    Usually all ranks fail for the same reason. Rank 0 reports it at once; the others wait a little, so that
    torchrun or srun can end them, and report only if they are still running.
    """
    _write_torchelastic_file(error)
    if place.rank:
        time.sleep(RANK_ZERO_FIRST_SECONDS)
    end_this_process_soon(error.exit_code if isinstance(error, UserError) else report.FAILED)
    if isinstance(error, UserError):
        return report.print_user_error(error, prefix=f"[rank {place.rank}] ")
    print(f"[rank {place.rank}] error:\n{traceback.format_exc().rstrip()}", file=sys.stderr, flush=True)
    return report.FAILED


def end_this_process_soon(code: int) -> None:
    """Force this process to exit if it has not after LEAVE_SECONDS: its peers wait for a failed rank to end."""

    def cut_off() -> None:
        time.sleep(LEAVE_SECONDS)
        os._exit(code)

    threading.Thread(target=cut_off, daemon=True, name="leave").start()


def _write_torchelastic_file(error: Exception) -> None:
    """Give torchrun the message for its own summary, in its format."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": str(error), "extraInfo": extra}}, file)
    except OSError:
        return  # the summary is a courtesy; the message itself goes to stderr


@contextmanager
def in_this_process() -> Iterator[Place]:
    """For calls from Python rather than a command: set the environment of one of the run's processes meanwhile.

    Raises UserError if the environment asks for processes to be started, which only a command does.
    """
    place = read_place()
    if place.mode == "start":
        count = place.world_size // place.nodes
        raise UserError(
            f"NPROC_PER_NODE={count}: a call from Python works in its own process, and starts no others",
            f"start the script with `torchrun --nproc_per_node {count} script.py`, or unset NPROC_PER_NODE and NNODES",
        )
    with _restored_environment():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        os.environ.update(place.as_environment())
        yield place


@contextmanager
def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
