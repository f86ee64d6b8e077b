"""Reading the next part while the last one is written."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from converters.stored import Buffers

Job = TypeVar("Job")


def read_ahead(
    jobs: Iterable[Job], fill: Callable[[Job, Buffers], torch.Tensor]
) -> Iterator[tuple[Job, torch.Tensor]]:
    """Each job with the tensor that `fill` makes of it in a buffer lent to it, in a thread, one job ahead.

    A tensor is valid until the next one is asked for: there are two buffers. What `fill` raises is raised
    here. `fill` runs in one thread only.
    """
    buffers = Buffers(), Buffers()
    ahead: tuple[Job, Future[torch.Tensor]] | None = None
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        for number, job in enumerate(jobs):
            future = thread.submit(fill, job, buffers[number % 2])
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = job, future
        if ahead is not None:
            yield ahead[0], ahead[1].result()
