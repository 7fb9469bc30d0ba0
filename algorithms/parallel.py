"""Independent parts of files, read, hashed and computed several at a time.

Reading, hashing and torch's operations release the interpreter lock, so threads use the machine's cores. What comes of
it does not depend on how many there are: results come in the order in which the parts were given, and so does an error.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import BoundedSemaphore
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
) -> Generator[Result, None, None]:
    """Do the same work on many parts, `THREADS` at a time.

    Making the parts counts as one of them while it goes on; but a part is at work beside it also where there is one
    thread.

    Args:
        work: what is done with each part, in a thread that is not the caller's. It writes at most to places that are
            its part's alone.
        parts: the parts; they do not depend on one another. What makes them works in the caller's thread.
        size: how large a part is. The largest is begun first, so that it is not the last one to end; left out, each
            part is begun as soon as it is there.

    Yields:
        What came of each part, in the order of the parts.

    Raises:
        Exception: what the parts' making raised; else what `work` raised of the first part, in their order, of which it
            raised anything. Parts that no thread has taken by then are left.
    """
    numbered: Iterable[tuple[int, Part]] = enumerate(parts)
    if size is not None:
        numbered = sorted(numbered, key=lambda pair: -size(pair[1]))
    free = BoundedSemaphore(THREADS)

    def done(part: Part) -> Result:
        with free:
            return work(part)

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        running: dict[int, Future[Result]] = {}
        try:
            with free if THREADS > 1 else nullcontext():
                for position, part in numbered:
                    running[position] = pool.submit(done, part)
            for position in range(len(running)):
                result = running[position].result()
                del running[position]
                yield result
        finally:
            for left in running.values():
                left.cancel()


def trailing(work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """Do the same work on parts one after another in another thread, on each while the next one is made.

    Args:
        work: what is done with each part; it is done with every part that was made, whatever fails afterwards.
        parts: the parts, made in the caller's thread.

    Yields:
        What came of each part, in order.

    Raises:
        Exception: what the parts' making raised, or `work` of the first part of which it raised anything.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        before: Future[Result] | None = None
        for part in parts:
            try:
                running = pool.submit(work, part)
            except RuntimeError:  # the system gives no thread
                work(part)
                raise
            if before is not None:
                yield before.result()
            before = running
        if before is not None:
            yield before.result()


@contextmanager
def beside(work: Callable[[], Result]) -> Iterator[Future[Result]]:
    """Do `work` in another thread while the caller does what is inside; it has ended once that is left."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit(work)
