"""Independent parts of files, read, hashed and computed several at a time.

Reading, hashing and torch's operations release the interpreter lock, so threads use the machine's cores. What comes of
it does not depend on how many there are: results come in the order in which the parts were given, and so does an error.
"""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may use: where the system knows it, those that its affinity (`taskset`) leaves."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


THREADS = min(8, usable_cores())
"""How many parts are worked on at once. Each holds a few blocks of a file in memory."""


def in_parallel(
    work: Callable[[Part], Result],
    parts: Iterable[Part],
    size: Callable[[Part], int] | None = None,
    *,
    most: int | None = None,
) -> Generator[Result, None, None]:
    """Do the same work on many parts, `THREADS` at a time.

    Args:
        work: what is done with each part, in a thread that is not the caller's. It writes at most to places that are
            its part's alone.
        parts: the parts; they do not depend on one another.
        size: how large a part is. The largest is begun first, so that it is not the last one to end; left out, parts
            are begun in their order.
        most: threads at most, where each needs much memory.

    Yields:
        What came of each part, in the order of the parts.

    Raises:
        Exception: what `work` raised of the first part, in their order, of which it raised anything. Parts that had not
            begun by then are left.
    """
    given = list(parts)
    positions = list(range(len(given)))
    if size is not None:
        positions.sort(key=lambda position: -size(given[position]))
    with ThreadPoolExecutor(max_workers=min(THREADS, most or THREADS)) as pool:
        running: dict[int, Future[Result]] = {position: pool.submit(work, given[position]) for position in positions}
        try:
            for position in range(len(given)):
                result = running[position].result()
                del running[position]
                yield result
        finally:
            for left in running.values():
                left.cancel()
