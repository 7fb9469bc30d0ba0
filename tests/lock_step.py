"""Writers that begin at the same moment, in threads of one process or in processes of their own."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.processes import fork

Wait = Callable[[], object]
Writer = Callable[[int, Wait], str]
"""Gets its number and what to call when it is ready; returns what became of it."""
Together = Callable[[Writer, int], list[str]]


def in_threads(writer: Writer, count: int) -> list[str]:
    """Writers 0 … count − 1 in threads of this process, let go at once; what became of each."""
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: writer(number, barrier.wait), range(count)))


def in_processes(writer: Writer, count: int) -> list[str]:
    """The same in processes of their own; nobody may have a connection open."""
    barrier = multiprocessing.get_context("fork").Barrier(count)
    children = [fork(lambda number=number: writer(number, barrier.wait)) for number in range(count)]
    ends = [child.wait() for child in children]
    assert not any(end.failed or end.signal for end in ends), ends
    return [end.told for end in ends]
