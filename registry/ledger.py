"""The append-only audit ledger in the database: how an event is appended, how events are read.

What an event hashes to and how the chain is checked stands in `registry.chain`, which knows no database.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from registry.chain import (
    GENESIS,
    Event,
    EventFields,
    Violation,
    canonical,
    check_chain,
    event_hash,
    is_canonical,
)
from registry.columns import format_timestamp, utc_now
from registry.errors import LedgerError
from registry.schema import NAME_LENGTH, LedgerEvent

__all__ = [
    "APPENDED",
    "GENESIS",
    "Event",
    "EventFields",
    "Violation",
    "append",
    "canonical",
    "check_chain",
    "event_hash",
    "events",
    "is_canonical",
    "ledger_head",
]

APPENDED = "neuronledger.appended"
"""Key of `Session.info`: the last event appended in the running transaction."""


def append(
    session: Session,
    *,
    action: str,
    subject_kind: str,
    subject_name: str,
    payload: Mapping[str, Any],
    actor: str,
    now: datetime | None = None,
) -> LedgerEvent:
    """Add one event at the end of the chain, inside the session's transaction.

    The session has to come from `Registry.write`, which lets one writer in at a time; were two to read the same last
    event, the primary key refuses the second.

    Args:
        subject_kind: the kind of record the event is about: "patch", "lineage", "model" …
        now: the event's time; the present moment if left out.

    Raises:
        LedgerError: the payload has no canonical form, or a field is empty, too long, or holds a NUL.
    """
    _require_text(actor=actor, action=action, subject_kind=subject_kind, subject_name=subject_name)
    text = canonical(payload).decode("utf-8")
    session.flush()
    count, previous_hash = ledger_head(session)
    fields: dict[str, Any] = {
        "sequence": count + 1,
        "created_at": format_timestamp(now or utc_now()),
        "actor": actor,
        "action": action,
        "subject_kind": subject_kind,
        "subject_name": subject_name,
        "payload": text,
        "previous_hash": previous_hash,
    }
    event = LedgerEvent(**fields, hash=event_hash(**fields))
    session.add(event)
    session.flush()
    session.info[APPENDED] = (event.sequence, event.hash, event.created_at)
    return event


def ledger_head(session: Session) -> tuple[int, str]:
    """How many events there are, and the last one's hash (GENESIS when there is none)."""
    last = session.execute(
        select(LedgerEvent.sequence, LedgerEvent.hash).order_by(LedgerEvent.sequence.desc()).limit(1)
    ).one_or_none()
    return (0, GENESIS) if last is None else (last.sequence, last.hash)


def events(
    session: Session,
    *,
    after: int = 0,
    where: Sequence[ColumnElement[bool]] = (),
    newest_first: bool = False,
    chunk: int = 2000,
) -> Iterator[Event]:
    """The events by sequence, streamed.

    Args:
        after: leaves out events up to that sequence.
        where: conditions on `LedgerEvent` that the database checks.
        newest_first: in descending order.
    """
    table = LedgerEvent.__table__
    query = select(*(table.c[name] for name in Event.__slots__)).where(table.c.sequence > after, *where)
    order = table.c.sequence.desc() if newest_first else table.c.sequence
    for row in session.execute(query.order_by(order).execution_options(yield_per=chunk)):
        yield Event(*row)


def _require_text(**fields: str) -> None:
    for name, value in fields.items():
        if not value or len(value) > NAME_LENGTH or "\0" in value or not _is_unicode(value):
            raise LedgerError(
                f"the event's {name} {value[:60]!r} is not a text of 1 to {NAME_LENGTH} characters",
                f"Give a shorter {name} of printable characters",
            )


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
