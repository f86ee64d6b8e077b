"""The only place that distinguishes CUDA from CPU."""

from mcore_swift.accelerator.accelerator import Accelerator, get_accelerator
from mcore_swift.accelerator.cpu_seam import install_cpu_seam

__all__ = ["Accelerator", "get_accelerator", "install_cpu_seam"]
