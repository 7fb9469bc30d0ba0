"""A lock is held while its process works, named while it lives, and reclaimed once it is gone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest
from sqlalchemy.orm import Session

from registry import locks
from registry.database import Registry
from registry.errors import LockedError, LockLostError
from registry.processes import Owner, process_with, this_process
from registry.schema import Lineage, LineageLock
from tests.registry.records import add_lineage

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def lineage(registry: Registry) -> int:
    with registry.write() as session:
        return add_lineage(session).id


@pytest.fixture
def other() -> Iterator[Owner]:
    """A process that lives until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = process_with(process.pid)
        assert owner is not None
        yield owner
        process.kill()


def _acquire(session: Session, lineage: int, token: str) -> None:
    locks.acquire(session, session.get_one(Lineage, lineage), token, "patch apply", "ada", NOW)


def _take_over(session: Session, lineage: int, token: str, **options: Any) -> None:
    locks.take_over(session, session.get_one(Lineage, lineage), token, "recover", "bob", NOW, **options)


def _give_to(registry: Registry, lineage: int, owner: Owner) -> None:
    with registry.write() as session:
        lock = session.get_one(LineageLock, lineage)
        lock.host, lock.pid, lock.process_started = owner.place, owner.pid, owner.started


def test_a_lock_is_held_once_and_its_holder_is_named(registry: Registry, lineage: int) -> None:
    with locks.at_work() as token, locks.at_work() as second:
        with registry.write() as session:
            _acquire(session, lineage, token)
        for act in (_acquire, _take_over):
            with pytest.raises(LockedError) as refusal, registry.write() as session:
                act(session, lineage, second)
            assert f"process {os.getpid()} on {this_process().host} (" in str(refusal.value)
            assert "patch apply by ada, since 2030-01-02 03:04:05 UTC" in str(refusal.value)
            assert refusal.value.exit_code == 3
        with registry.write() as session:
            locks.release(session, lineage, token)
        with registry.write() as session:
            _acquire(session, lineage, second)


def test_what_this_process_left_behind_is_reclaimed(registry: Registry, lineage: int) -> None:
    with locks.at_work() as token, registry.write() as session:
        _acquire(session, lineage, token)
    with locks.at_work() as second:
        with pytest.raises(LockedError, match="neuronledger recover"), registry.write() as session:
            _acquire(session, lineage, second)
        with registry.write() as session:
            _take_over(session, lineage, second)
        with registry.read() as session:
            held = locks.holder(session, lineage)
            assert held is not None
            assert (held.token, held.purpose) == (second, "recover")
        with pytest.raises(LockLostError, match="another process"), registry.write() as session:
            locks.release(session, lineage, token)


def test_a_living_process_keeps_its_lock_and_a_dead_one_loses_it(
    registry: Registry, lineage: int, other: Owner
) -> None:
    with locks.at_work() as token:
        with registry.write() as session:
            _acquire(session, lineage, token)
        _give_to(registry, lineage, other)
        with pytest.raises(LockedError, match=f"process {other.pid} .* Wait until"), registry.write() as session:
            _take_over(session, lineage, token)
        psutil.Process(other.pid).kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert other.liveness == "dead"  # a zombie until its parent asks for it
        with registry.write() as session:
            _take_over(session, lineage, token)


def test_a_number_that_is_used_again_is_another_process(other: Owner) -> None:
    assert other.liveness == "alive"
    assert Owner(other.place, other.pid, other.started - 60).liveness == "dead"


@pytest.mark.parametrize("place", ["far.example", "far.example+-+-+-"])
def test_a_lock_of_another_host_is_taken_over_only_when_told_to(registry: Registry, lineage: int, place: str) -> None:
    with locks.at_work() as token:
        with registry.write() as session:
            _acquire(session, lineage, token)
        _give_to(registry, lineage, Owner(place, 7, 1))
        with (
            pytest.raises(LockedError, match=r"on far\.example \(.*on far\.example or .*--take-over"),
            registry.write() as session,
        ):
            _take_over(session, lineage, token)
        with registry.write() as session:
            _take_over(session, lineage, token, foreign=True)


def test_a_lock_from_before_places_were_recorded_is_taken_over_only_when_told_to(
    registry: Registry, lineage: int, other: Owner
) -> None:
    with locks.at_work() as token:
        with registry.write() as session:
            _acquire(session, lineage, token)
        _give_to(registry, lineage, Owner(other.host, 2**22 + 1, 1))
        with pytest.raises(LockedError, match="--take-over"), registry.write() as session:
            _take_over(session, lineage, token)
        with registry.write() as session:
            _take_over(session, lineage, token, foreign=True)
