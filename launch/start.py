"""Start this node's workers with torch.distributed's elastic launcher and report how they ended."""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import report
from .environment import Place

NODES_TIMEOUT_SECONDS = 600
STOP_SECONDS = 20
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def start(place: Place, command: str, argv: list[str], target: str) -> int:
    """Run `target` in `place.processes_here` workers and wait for them. Returns the exit code.

    When a worker fails, the others get SIGTERM, and after a time limit SIGKILL. The same happens when a signal
    stops this process; if it is killed, its workers notice and end.
    """
    folder = Path(tempfile.mkdtemp(prefix="mcore-swift-launch-"))
    os.environ[report.FOLDER_VARIABLE] = str(folder)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    try:
        with _restored_signals():
            return _launch(place, command, _worker_arguments(argv, target), folder)
    except KeyboardInterrupt:
        return _stopped(command, signal.SIGINT)
    finally:
        _end_stragglers(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _launch(place: Place, command: str, arguments: list[str], folder: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_elastic()
    interrupted = []

    def on_interrupt(number: int, frame: Any) -> None:
        # pass it on to workers as SIGTERM: SIGINT would print a traceback from each child process
        interrupted.append(number)
        raise SignalException(f"got {signal.Signals(number).name}", signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
    handled = {field.name for field in fields(LaunchConfig)} & {"signals_to_handle"}  # not in older torch
    config = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=place.processes_here,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        run_id=f"mcore-swift-{command}",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        **dict.fromkeys(handled, "SIGTERM,SIGHUP,SIGQUIT"),
        **_rendezvous(place),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
        return 0
    except ChildFailedError as error:
        return report.print_failure(report.read_all(folder), _exits(error))
    except SignalException as error:
        return _stopped(command, interrupted[0] if interrupted else error.sigval)
    except Exception as error:
        return _rendezvous_failure(place, error)


def _rendezvous(place: Place) -> dict[str, Any]:
    """How the workers find each other.

    On one node without a given port: through the agent's own store, which binds a free port and keeps it, so that
    nobody can take it in between. Otherwise at the first node's address and port, as torchrun does by default.
    """
    if place.nodes == 1 and place.master_port is None:
        return {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "local_addr": "127.0.0.1",
            "rdzv_configs": {"timeout": NODES_TIMEOUT_SECONDS, "is_host": True},
        }
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{place.master_addr}:{place.master_port}",
        "rdzv_configs": {"timeout": NODES_TIMEOUT_SECONDS, "rank": place.node_rank},
    }


def _rendezvous_failure(place: Place, error: Exception) -> int:
    """Report a failure before any worker runs: a port in use, nodes that do not arrive. Other errors are raised."""
    from mcore_swift.errors import UserError

    where = f"{place.master_addr}:{place.master_port}"
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        message = f"MASTER_PORT={place.master_port} is in use on this machine"
        remedy = "set another one" if place.nodes > 1 else "set another one, or unset it to take a free one"
        return report.print_user_error(UserError(message, remedy))
    if type(error).__name__ in ("DistStoreError", "DistNetworkError", "RendezvousTimeoutError"):
        message = (
            f"node {place.node_rank} of {place.nodes} found no complete group of nodes at {where} "
            f"(limit {NODES_TIMEOUT_SECONDS} s): {text.splitlines()[0]}"
        )
        remedy = (
            "start every node with the same NNODES, MASTER_ADDR and MASTER_PORT and a NODE_RANK of its own"
        )
        return report.print_user_error(UserError(message, remedy))
    raise error


def _worker_arguments(argv: list[str], target: str) -> list[str]:
    """Command line of a worker, after the interpreter.

    `-m` puts the current folder first on the import path, where a user's file could shadow a library. -P prevents
    that, unless the folder is on this process's path already.
    """
    here = {"", os.getcwd()}
    safe_path = [] if here & set(sys.path) else ["-P"]
    return [*safe_path, "-u", "-m", "launch.worker", target, *argv]


def _exits(error: Any) -> list[report.Exit]:
    return [
        report.Exit(rank, failure.exitcode, failure.pid, failure.timestamp)
        for rank, failure in error.failures.items()
    ]


def _stopped(command: str, number: int) -> int:
    print(f"{command}: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number


def _end_stragglers(folder: Path) -> None:
    """Kill what workers left running: each worker leads a process group of its own."""
    for pid in report.pids(folder):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _silence_elastic() -> None:
    """Silence the elastic launcher's log, which repeats our one message; setting LOGLEVEL brings it back."""
    if os.environ.get("LOGLEVEL"):
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Restore the caller's signal handlers, which the elastic launcher replaces."""
    try:
        before = {number: signal.getsignal(number) for number in _SIGNALS}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError, TypeError):  # not in the main thread, or set from C
                signal.signal(number, handler)
