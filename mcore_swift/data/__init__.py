"""From files of rows to the batches of a step: sources -> messages -> token ids with weights -> packs -> batches.

`check_sources` and the readers need neither torch nor transformers, so a launcher can report a wrong path, an
unknown extension or invalid JSON before anything heavy is imported. The rest is loaded on first use.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Batch": ".batch",
    "DataReport": ".report",
    "DataSettings": ".settings",
    "EvalSteps": ".steps",
    "Prefetcher": ".prefetch",
    "PreparedData": ".prepared",
    "Steps": ".steps",
    "check_sources": ".check",
    "prepare": ".prepared",
}

__all__ = [
    "Batch",
    "DataReport",
    "DataSettings",
    "EvalSteps",
    "Prefetcher",
    "PreparedData",
    "Steps",
    "check_sources",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
