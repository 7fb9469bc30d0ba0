"""However many threads work, the results, their order and the first error are the same."""

import os
import time
from concurrent.futures import Future
from threading import Event, Lock, Thread, current_thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algorithms import parallel
from algorithms.parallel import beside, in_parallel, trailing, usable_cores


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


def test_making_parts_counts_as_one_of_those_at_work(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 3)
    lock, working, most = Lock(), 0, [0, 0]
    made, several = False, Event()

    def work(part: int) -> None:
        nonlocal working
        with lock:
            working += 1
            most[made] = max(most[made], working)
        if part == 5:
            several.set()
        time.sleep(0.01)
        with lock:
            working -= 1

    def parts():
        nonlocal made
        yield from range(30)
        assert several.wait(10)
        made = True

    list(in_parallel(work, parts()))
    assert most == [2, 3]


def test_cores_that_the_process_may_not_use_are_not_counted(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_a_part_is_at_work_while_the_next_is_made_in_the_callers_thread(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 1)
    done = Event()

    def parts():
        yield 1
        assert done.wait(10)
        assert current_thread() is caller
        yield 2

    caller = current_thread()
    assert list(in_parallel(lambda part: done.set() or part, parts())) == [1, 2]


def test_an_error_of_the_making_of_parts_is_raised_when_those_at_work_have_ended(monkeypatch):
    monkeypatch.setattr(parallel, "THREADS", 1)
    begun, ended = Event(), Event()
    worked: list[int] = []

    def work(part: int) -> None:
        begun.set()
        worked.append(part)
        time.sleep(0.05)
        ended.set()

    def parts():
        yield from (1, 2)
        assert begun.wait(10)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(in_parallel(work, parts()))
    assert ended.is_set()
    assert worked == [1]


def test_what_is_done_beside_has_ended_when_the_caller_fails():
    ended = Event()

    def work() -> None:
        time.sleep(0.05)
        ended.set()

    with pytest.raises(ZeroDivisionError), beside(work):
        raise ZeroDivisionError
    assert ended.is_set()


def test_what_is_done_beside_fails_where_it_is_asked_for():
    def work() -> int:
        raise ValueError("beside")

    with beside(work) as running:
        pass
    with pytest.raises(ValueError, match="beside"):
        running.result()


def test_a_part_is_worked_on_while_the_next_is_made_and_given_before_the_one_after():
    told: list[str] = []
    working = Event()

    def work(part: int) -> int:
        working.set()
        return -part

    def parts():
        for part in (1, 2, 3):
            told.append(f"made {part}")
            yield part
            assert working.wait(10)  # nobody has asked for the result of this part yet
            working.clear()

    told.extend(f"given {result}" for result in trailing(work, parts()))
    assert told == ["made 1", "made 2", "given -1", "made 3", "given -2", "given -3"]
    assert list(trailing(work, [])) == []


def test_every_part_that_was_made_is_worked_on_though_the_next_cannot_be_made():
    worked: list[int] = []

    def parts():
        yield from (1, 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(trailing(worked.append, parts()))
    assert worked == [1, 2]


def test_what_work_raises_is_raised_when_the_parts_made_meanwhile_have_been_worked_on():
    worked: list[int] = []

    def work(part: int) -> None:
        worked.append(part)
        if part == 1:
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        list(trailing(work, [1, 2, 3]))
    assert worked == [1, 2]


def test_what_was_made_is_worked_on_also_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as closing a file that was opened for it."""
    done: list[int] = []

    def refused(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refused)
    with pytest.raises(RuntimeError, match="new thread"):
        list(trailing(done.append, iter(range(3))))
    assert done == [0]
