"""What the environment says about a run's processes: join them, start them, or run in this one alone."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mcore_swift.errors import UserError, raise_together

from . import slurm

DEFAULT_PORT = 29500
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """This process's place in the run.

    mode: "alone" (the only process), "joined" (one of several that torchrun or srun started), "start" (not a
    worker: it starts this node's processes). rank and local_rank apply to "alone" and "joined"; nodes and
    node_rank to "start". master_port None: any free port.
    """

    mode: Literal["alone", "joined", "start"]
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    processes_here: int = 1
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = _LOOPBACK
    master_port: int | None = None

    def as_environment(self) -> dict[str, str]:
        """The variables that torch.distributed's `env://` reads, for a process that is not "start"."""
        port = self.master_port if self.master_port is not None else free_port()
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.processes_here),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(port),
        }


def world_size_from_env(env: Mapping[str, str] | None = None) -> int:
    """Number of processes the run will have, before any is started. Raises UserError like `read_place`."""
    return read_place(env).world_size


def read_place(env: Mapping[str, str] | None = None) -> Place:
    """Read the environment. Raises one UserError for all variables that make no sense.

    RANK, WORLD_SIZE and MASTER_ADDR mean "joined". But some schedulers set these three for each node and leave it
    to the user's command to start the node's processes: then NPROC_PER_NODE or NNODES is set and LOCAL_RANK is
    not, which means "start".
    """
    env = os.environ if env is None else env
    wants_start = any(env.get(name) for name in ("NPROC_PER_NODE", "NNODES"))
    if all(env.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")) and (
        env.get("LOCAL_RANK") or not wants_start
    ):
        return _joined(env)
    if slurm.is_worker(env) and not (wants_start and slurm.tasks_here(env) == 1):
        return _joined_slurm(env)
    if wants_start:
        return _to_start(env)
    return Place("alone")


def usable_cores() -> int:
    """CPU cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on every system
        return os.cpu_count() or 1


def free_port() -> int:
    """A TCP port of the loopback interface that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]


class _Reader:
    """Reads whole numbers and collects the mistakes, so that all are reported at once."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.problems: list[UserError] = []

    def number(self, name: str, default: int, at_least: int, below: int | None = None) -> int:
        text = (self.env.get(name) or "").strip()
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or not at_least <= int(text):
            least = f"of at least {at_least}" if at_least else "from 0 on"
            self.add(f"{name}={text} is no whole number {least}", f"set {name} to one, or unset it")
            return default
        if below is not None and int(text) >= below:
            self.add(f"{name}={text} is out of range", f"it counts from 0 to {below - 1}")
            return default
        return int(text)

    def add(self, message: str, remedy: str) -> None:
        self.problems.append(UserError(message, remedy))


def _joined(env: Mapping[str, str]) -> Place:
    read = _Reader(env)
    world_size = read.number("WORLD_SIZE", 1, 1)
    rank = read.number("RANK", 0, 0, below=world_size)
    here = read.number("LOCAL_WORLD_SIZE", 1, 1)
    # without LOCAL_RANK there is one process per host or container, as such schedulers start them
    local_rank = read.number("LOCAL_RANK", 0, 0)
    port = read.number("MASTER_PORT", DEFAULT_PORT, 1, below=65536)
    raise_together(read.problems)
    return Place(
        "joined",
        world_size,
        rank,
        local_rank,
        max(here, local_rank + 1),
        master_addr=env["MASTER_ADDR"],
        master_port=port,
    )


def _joined_slurm(env: Mapping[str, str]) -> Place:
    task = slurm.read_task(env)
    if task.world_size == 1:
        return Place("alone")
    read = _Reader(env)
    port = read.number("MASTER_PORT", task.port, 1, below=65536)
    raise_together(read.problems)
    return Place(
        "joined",
        task.world_size,
        task.rank,
        task.local_rank,
        task.tasks_here,
        master_addr=env.get("MASTER_ADDR") or task.first_host,
        master_port=port,
    )


def _to_start(env: Mapping[str, str]) -> Place:
    read = _Reader(env)
    here = read.number("NPROC_PER_NODE", 1, 1)
    nodes = read.number("NNODES", 1, 1)
    node_rank_name = "NODE_RANK" if env.get("NODE_RANK") or not env.get("SLURM_NODEID") else "SLURM_NODEID"
    node_rank = read.number(node_rank_name, 0, 0, below=nodes)
    port = read.number("MASTER_PORT", DEFAULT_PORT if nodes > 1 else 0, 1, below=65536)
    master_addr = env.get("MASTER_ADDR") or _LOOPBACK
    if nodes > 1 and not env.get(node_rank_name):
        read.add(
            f"NNODES={nodes} needs NODE_RANK", f"set it to 0 on the first node, to {nodes - 1} on the last"
        )
    if nodes > 1 and not env.get("MASTER_ADDR"):
        read.add(
            f"NNODES={nodes} needs MASTER_ADDR", "set it to the address of the first node, on every node"
        )
    raise_together(read.problems)
    if nodes * here == 1:
        return Place("alone")
    return Place(
        "start",
        world_size=nodes * here,
        processes_here=here,
        nodes=nodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=port or None,
    )
