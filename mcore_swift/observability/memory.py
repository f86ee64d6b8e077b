"""Memory of this process on the host."""

import resource
import sys
from pathlib import Path


def host_memory_peak_bytes() -> int:
    """The largest resident set this process has had, in bytes (VmHWM of proc(5), else getrusage(2))."""
    value = _status("VmHWM:")
    if value is not None:
        return value
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def host_memory_bytes() -> int | None:
    """The resident set of this process now, in bytes; None where there is no /proc."""
    return _status("VmRSS:")


def reset_host_memory_peak() -> bool:
    """Reset the peak to the current resident set; False if the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None
