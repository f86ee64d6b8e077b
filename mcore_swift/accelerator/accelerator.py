"""One interface to the device we run on: CUDA with NCCL, or CPU with gloo."""

import contextlib
import ctypes
import os
from functools import cache

import torch

from mcore_swift.accelerator.cpu_seam import install_cpu_seam


class Accelerator:
    """The device of this process and what the rest of the code asks of it.

    device: where parameters and batches live.
    backend: the torch.distributed backend that serves the device.
    """

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the device ready. Called once per process, before a model is built."""

    def install(self) -> None:
        """`prepare`, and make megatron-core work on the device. To be called before megatron-core is imported."""
        self.prepare()

    def memory_peak_bytes(self) -> int:
        """The most memory this process has used on the device, in bytes."""
        raise NotImplementedError


class CudaAccelerator(Accelerator):
    """The GPU of this local rank, with NCCL."""

    backend = "nccl"

    def __init__(self) -> None:
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        self.device = torch.device("cuda", index)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def prepare(self) -> None:
        torch.cuda.set_device(self.device)

    def memory_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class CpuAccelerator(Accelerator):
    """The host, with gloo. Memory is the resident set of the process."""

    backend = "gloo"
    device = torch.device("cpu")

    @property
    def name(self) -> str:
        return "cpu"

    def prepare(self) -> None:
        _keep_freed_memory()

    def install(self) -> None:
        self.prepare()
        install_cpu_seam()

    def memory_peak_bytes(self) -> int:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0


def _keep_freed_memory() -> None:
    """Make the C library keep large freed blocks instead of returning them to the system.

    Every step asks for the same sizes again, and the first touch of fresh pages costs more than the arithmetic
    done on them: up to four times the time of an elementwise pass over logits. Does nothing without glibc.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@cache
def get_accelerator() -> Accelerator:
    """The accelerator of this process: CUDA where there is a GPU, else the CPU."""
    return CudaAccelerator() if torch.cuda.is_available() else CpuAccelerator()
