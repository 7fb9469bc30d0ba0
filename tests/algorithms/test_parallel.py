"""However many threads work, the results, their order and the first error are the same."""

import os
import time
from concurrent.futures import Future
from threading import Event, Lock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algorithms import parallel
from algorithms.parallel import in_parallel, usable_cores


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.integers(0, 9), max_size=20), threads=st.integers(1, 8), sized=st.booleans())
def test_results_stand_in_the_order_of_the_parts(monkeypatch, parts, threads, sized):
    monkeypatch.setattr(parallel, "THREADS", threads)
    size = (lambda part: part) if sized else None
    assert list(in_parallel(lambda part: -part, parts, size)) == [-part for part in parts]


@pytest.mark.parametrize("size", [None, lambda part: part], ids=["in order", "largest first"])
def test_the_first_parts_error_is_raised_though_another_failed_before(monkeypatch, size):
    monkeypatch.setattr(parallel, "THREADS", 2)
    other_failed = Event()

    def work(part: int) -> int:
        if part == 2:
            other_failed.set()
            raise ValueError("the second")
        assert other_failed.wait(10)
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        list(in_parallel(work, [1, 2], size))


def test_results_before_an_error_are_given_and_parts_that_had_not_begun_are_left(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 2)
    begun: list[int] = []

    def work(part: int) -> int:
        begun.append(part)
        time.sleep(0.001)
        if part == 3:
            raise ValueError(part)
        return part

    results = in_parallel(work, range(5_000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert len(begun) < 5_000


def test_a_part_that_is_waited_for_and_had_not_begun_is_left_at_an_interrupt(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 1)
    begun: list[int] = []

    def interrupted(self, timeout=None):  # where Ctrl-C reaches the thread of the command
        raise KeyboardInterrupt

    def work(part: int) -> None:
        begun.append(part)
        time.sleep(0.05)

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_parallel(work, [1, 5], lambda part: part))
    assert begun == [5]


def test_the_largest_part_is_begun_first(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 1)
    begun: list[int] = []
    assert list(in_parallel(begun.append, [2, 5, 3], lambda part: part)) == [None, None, None]
    assert begun == [5, 3, 2]


def test_as_many_parts_are_at_work_as_there_are_threads_and_no_more(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 3)
    lock, working, most = Lock(), 0, 0

    def work(_: int) -> None:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0.01)
        with lock:
            working -= 1

    list(in_parallel(work, range(30)))
    assert most == 3


def test_cores_that_the_process_may_not_use_are_not_counted(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64
