"""What tells one conversion from another, so that only the same one is taken up where it was cut short."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.stream import HFPlan, MCorePlan

FORMAT = 1
"""Raised when the files of an unfinished conversion change their meaning."""


def identity(plan: MCorePlan | HFPlan, files: Iterable[Path]) -> dict[str, Any]:
    """Of a conversion: what it reads, and exactly which bytes each process writes for it.

    files: that it reads. A file counts as the same by its path, size and time of change.
    """
    shares = plan.shares if isinstance(plan, MCorePlan) else [plan.files, plan.part_bytes]
    digest = hashlib.sha256()
    for part in (type(plan).__name__, plan.table.rules, plan.specs, shares):
        digest.update(repr(part).encode())
    found = {}
    for path in sorted(set(files)):
        status = path.stat()
        found[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
    return {"format": FORMAT, "plan": digest.hexdigest(), "source": found}
