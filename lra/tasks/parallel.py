"""Compiled work on all cores, with results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`map(work, items)` on threads, for work that drops the GIL; at most two results a worker are held at a time.

    items     may be endless: close the iterator to stop
    workers   threads; the default is one a core
    """
    workers = workers or cores()
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(work, item) for item in islice(remaining, 2 * workers))  # none waits for a slow first
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(work, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()


def cores() -> int:
    """The cores this process may use; a cluster's job sees fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
