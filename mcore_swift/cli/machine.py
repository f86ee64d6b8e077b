"""What this machine has: cores, memory, GPUs, and what torch can do with them."""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from launch.environment import usable_cores

NVIDIA_SMI_SECONDS = 10
TORCH_SECONDS = 60

_GIB = 2**30

# runs in a separate process: importing torch takes seconds and may fail
_TORCH_QUESTIONS = """
import json, torch, torch.distributed as dist
there = dist.is_available()
print(json.dumps({
    "cuda": torch.cuda.is_available(),
    "cuda_built": torch.version.cuda,
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    "gloo": there and dist.is_gloo_available(),
    "nccl": there and dist.is_nccl_available(),
}))
"""


@dataclasses.dataclass
class Machine:
    """The result of `look`.

    cores: number that this process may use. gpus: name and memory of each. torch: its answers, or {"error": ...}.
    """

    system: str
    cores: int
    memory_gib: float | None
    memory_free_gib: float | None
    gpus: list[str]
    torch: dict[str, object]


class TorchProbe:
    """Queries torch in a separate process, which runs in parallel with the other checks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TORCH_QUESTIONS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> dict[str, object]:
        """The answers, or {"error": ...} if torch cannot be imported within a minute."""
        try:
            out, err = self._process.communicate(timeout=TORCH_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"torch did not import within {TORCH_SECONDS} s"}
        if self._process.returncode:
            last = (err.strip().splitlines() or ["no message"])[-1]
            return {"error": f"torch does not import: {last}"}
        return json.loads(out.strip().splitlines()[-1])


def look(probe: TorchProbe | None) -> Machine:
    """Describe this machine. probe: None if torch is not installed."""
    total, free = _memory()
    gpus = nvidia_smi()
    answers = probe.answer() if probe else {"error": "torch is not installed"}
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        memory_gib=total,
        memory_free_gib=free,
        gpus=gpus or [str(name) for name in answers.get("gpus", [])],
        torch=answers,
    )


def _memory() -> tuple[float | None, float | None]:
    """(total, free) memory in GiB, or the container's limit where that is lower."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    limit = _container_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    return round(total / _GIB, 1), round(free / _GIB, 1)


def _container_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def nvidia_smi() -> list[str]:
    """Name and memory of each NVIDIA GPU that the driver knows; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
