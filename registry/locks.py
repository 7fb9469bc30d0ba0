"""Who is writing to a lineage's working checkpoint.

A lock is a row: the place, the process with the moment it began, and a token. It is taken in the transaction that
records the intent and given back in the one that records the result, so there is one exactly while a patch is being
applied or reverted. Of a process that is gone the lock is reclaimed; of one that lives it is named. A process's number
is used again in time, hence the moment it began. Of another host, or of a container, nothing can be known from here:
its locks are taken over only when a person says so. See `registry.processes`.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.errors import LockedError, LockLostError
from registry.processes import Liveness, Owner, this_process
from registry.schema import Lineage, LineageLock

_AT_WORK: set[str] = set()
"""Tokens of this process whose work goes on, so that what a failure left behind is not taken for it."""


@contextmanager
def at_work() -> Iterator[str]:
    """A new token, good for `acquire` as long as this lasts."""
    token = secrets.token_hex(16)
    _AT_WORK.add(token)
    try:
        yield token
    finally:
        _AT_WORK.discard(token)


def holder(session: Session, lineage_id: int) -> LineageLock | None:
    """The lock of a lineage, if it is held."""
    return session.get(LineageLock, lineage_id)


def liveness(lock: LineageLock) -> Liveness:
    """Whether the work that a lock stands for goes on."""
    process = owner(lock)
    if process.is_this_process:
        return "alive" if lock.token in _AT_WORK else "dead"
    return process.liveness


def acquire(session: Session, lineage: Lineage, token: str, purpose: str, actor: str, now: datetime) -> None:
    """Take a lineage's lock.

    Raises:
        LockedError: it is held; whoever holds it is named, alive or not.
    """
    held = _locked_holder(session, lineage.id)
    if held is not None:
        raise locked_error(lineage.name, held)
    session.add(_lock(lineage.id, token, purpose, actor, now))
    session.flush()


def take_over(
    session: Session, lineage: Lineage, token: str, purpose: str, actor: str, now: datetime, *, foreign: bool = False
) -> None:
    """Take a lineage's lock, reclaiming it where its owner is gone.

    Args:
        session: a writing session.
        lineage: the lineage.
        token: from `at_work`.
        purpose: what for, as errors name it.
        actor: who acts.
        now: when.
        foreign: also take it from another host or container, of which nothing is known.

    Raises:
        LockedError: its owner lives, or nothing is known of it.
    """
    held = _locked_holder(session, lineage.id)
    if held is not None:
        state = liveness(held)
        if state == "alive" or (state == "unknown" and not foreign):
            raise locked_error(lineage.name, held)
        session.delete(held)
        session.flush()
    session.add(_lock(lineage.id, token, purpose, actor, now))
    session.flush()


def release(session: Session, lineage_id: int, token: str) -> None:
    """Give a lock back.

    Raises:
        LockLostError: it is no longer held with this token: somebody recovered the lineage meanwhile.
    """
    session.flush()
    gone = session.execute(
        delete(LineageLock)
        .where(LineageLock.lineage_id == lineage_id, LineageLock.token == token)
        .returning(LineageLock.lineage_id)
    ).first()
    if gone is None:
        raise LockLostError(
            "the lineage was recovered by another process while this one was writing to it",
            "Run audit verify --weights, and apply the patch again if it is not there",
        )


def locked_error(lineage: str, lock: LineageLock) -> LockedError:
    """The error that names who holds a lock and what can be done."""
    host = owner(lock).host
    mends = {
        "alive": "Wait until it is done",
        "dead": "Run `neuronledger recover`",
        "unknown": f"Wait until it is done; if nothing runs on {host} or in a container there, run "
        "`neuronledger recover --take-over`",
    }
    since = f"{lock.acquired_at:%Y-%m-%d %H:%M:%S} UTC"
    return LockedError(
        f"lineage {lineage} is held by process {lock.pid} on {host} ({lock.purpose} by {lock.actor}, since {since})",
        mends[liveness(lock)],
    )


def _locked_holder(session: Session, lineage_id: int) -> LineageLock | None:
    """The lock as it is while the lineage's row is locked (PostgreSQL; SQLite has one writer anyway)."""
    session.execute(select(Lineage.id).where(Lineage.id == lineage_id).with_for_update())
    return session.get(LineageLock, lineage_id, populate_existing=True)


def owner(lock: LineageLock) -> Owner:
    """The process that holds a lock."""
    return Owner(lock.host, lock.pid, lock.process_started)


def _lock(lineage_id: int, token: str, purpose: str, actor: str, now: datetime) -> LineageLock:
    process = this_process()
    return LineageLock(
        lineage_id=lineage_id,
        purpose=purpose,
        host=process.place,
        pid=process.pid,
        process_started=process.started,
        token=token,
        actor=actor,
        acquired_at=now,
    )
