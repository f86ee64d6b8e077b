"""What srun tells each task about itself (variables as in srun's manual page)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mcore_swift.errors import UserError

_FIRST_PORT, _PORTS = 20000, 10000


@dataclass(frozen=True)
class Task:
    """One task of a job step. first_host: where rank 0 runs; port: the same for all tasks of the step."""

    rank: int
    world_size: int
    local_rank: int
    tasks_here: int
    first_host: str
    port: int


def is_worker(env: Mapping[str, str]) -> bool:
    """Whether this process is a task of srun.

    The batch script itself has SLURM_PROCID too but is not a job step: it must not wait for tasks that were
    never started.
    """
    in_batch_script = bool(env.get("SLURM_JOB_ID")) and not env.get("SLURM_STEP_ID")
    return bool(env.get("SLURM_PROCID") and _tasks(env)) and not in_batch_script


def read_task(env: Mapping[str, str]) -> Task:
    """This task's place. Raises UserError for a variable that makes no sense."""
    try:
        rank, world_size = int(env["SLURM_PROCID"]), int(_tasks(env))
        local_rank = int(env.get("SLURM_LOCALID") or 0)
        job = int(env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID") or 0)
        step = int(env.get("SLURM_STEP_ID") or 0)
        here = max(tasks_here(env), local_rank + 1)
        host = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1")
    except ValueError as error:
        raise UserError(
            f"the SLURM_* variables make no sense: {error}", "start with srun, or unset them"
        ) from None
    # so that successive steps, and jobs sharing a node, get different ports
    return Task(rank, world_size, local_rank, here, host, _FIRST_PORT + (job * 7 + step) % _PORTS)


def tasks_here(env: Mapping[str, str]) -> int:
    """Number of tasks of this step on this node, 0 if unknown. Raises ValueError for a malformed list."""
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not per_node:
        return int(env.get("SLURM_NTASKS_PER_NODE") or 0)
    node = int(env.get("SLURM_NODEID") or 0)
    for entry in per_node.split(","):  # such as 4(x2),3
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if not match:
            raise ValueError(f"tasks per node '{per_node}'")
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    return 0


def first_host(nodes: str) -> str:
    """First name of a host list: 'gpu003' of 'gpu[003-005,9],login1'. Raises ValueError for a malformed list."""
    match = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\])?([^,\[\]]*)", nodes)
    if not match:
        raise ValueError(f"node list '{nodes}'")
    return match[1] + (match[2] or "") + match[3]


def _tasks(env: Mapping[str, str]) -> str:
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or ""
