"""A process group as converters use it; with one process, torch.distributed is not needed."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from mcore_swift.errors import DiskFull, UserError, raise_together

T = TypeVar("T")


class Ranks:
    """The processes that work together: a process group (the default one), or this process alone."""

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if active else 0
        self.size: int = dist.get_world_size(group) if active else 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, value: Any) -> list[Any]:
        """`value` of every rank, on the first rank; an empty list on the others. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        first = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.gather_object(value, values, dst=first, group=self.group)
        return values or []

    def union(self, held: Mapping[str, T]) -> dict[str, T]:
        """The entries of every rank's mapping in one. Collective; a key that several ranks have is the same on all."""
        return {key: value for of_rank in self.gather(dict(held)) for key, value in of_rank.items()}

    def together(self, action: Callable[[], T], *, where: bool = True) -> T | None:
        """Run `action` on the ranks on which `where` holds; what it raises on any rank is raised on all. Collective.

        Returns what the action returned on this rank, None if it was not run here.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            if where:
                result = action()
        except Exception as raised:  # whatever it is: no rank may go on alone
            error = raised
        self.agree(error)
        return result

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank the errors of all ranks, if there are any. Collective, and thus a barrier.

        A failed rank waits here for the others instead of leaving them in a collective that it will never join.
        """
        told = error if error is None or isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failures = [(rank, failure) for rank, failure in enumerate(self.gather(told)) if failure is not None]
        if not failures:
            return
        if error is not None and not isinstance(error, UserError):
            raise error
        mistakes: dict[Any, UserError] = {}
        for _, failure in failures:
            if isinstance(failure, UserError):
                mistakes.setdefault(DiskFull if isinstance(failure, DiskFull) else str(failure), failure)
        defects = [f"rank {rank}: {failure}" for rank, failure in failures if isinstance(failure, str)]
        if defects:
            raise RuntimeError("; ".join(defects))
        raise_together(mistakes.values())
