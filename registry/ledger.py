"""The append-only audit ledger: what an event hashes to, how the chain is checked, how an event is appended.

An event's hash is the SHA-256 of the canonical JSON (RFC 8785) of its eight fields, of which `previous_hash` is the
hash of the event before it, so that no event can be edited, removed or put in without every later hash changing.
Rewriting the whole chain, or cutting its end off, leaves a consistent chain: `registry.heads` keeps counts and hashes
outside the database, and `registry.head_lines` names those by them.

Everything here but `append`, `events` and `ledger_head` is without I/O and works on exported events as well.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import rfc8785
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from registry.columns import format_timestamp, utc_now
from registry.errors import LedgerError
from registry.schema import NAME_LENGTH, LedgerEvent

GENESIS = "0" * 64
"""What the first event names as the hash before it."""

APPENDED = "neuronledger.appended"
"""Key of `Session.info`: the last event appended in the running transaction."""

_LARGEST_EXACT_INTEGER = 2**53 - 1
_encode_string = json.JSONEncoder(ensure_ascii=False).encode
_encode_sorted = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


class EventFields(Protocol):
    """The fields of an event: a row of `ledger_events`, an `Event`, or a line of an exported ledger."""

    @property
    def sequence(self) -> int: ...
    @property
    def created_at(self) -> str: ...
    @property
    def actor(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def subject_kind(self) -> str: ...
    @property
    def subject_name(self) -> str: ...
    @property
    def payload(self) -> str: ...
    @property
    def previous_hash(self) -> str: ...
    @property
    def hash(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Event:
    """One ledger event, free of any session. `payload` is canonical JSON text."""

    sequence: int
    created_at: str
    actor: str
    action: str
    subject_kind: str
    subject_name: str
    payload: str
    previous_hash: str
    hash: str

    def content(self) -> dict[str, Any]:
        """The payload as an object."""
        content: dict[str, Any] = json.loads(self.payload)
        return content


@dataclass(frozen=True, slots=True)
class Violation:
    """Something wrong with the ledger: which event, and what. `sequence` is None where no one event is at fault."""

    sequence: int | None
    problem: str


def canonical(payload: Mapping[str, Any]) -> bytes:
    """The canonical JSON (RFC 8785) of a payload.

    Raises:
        LedgerError: the payload holds NaN, an infinity, an integer beyond ±(2⁵³ − 1), text that is not Unicode, a key
            that is not text, or a type that JSON lacks.
    """
    try:
        return rfc8785.dumps(dict(payload))
    except rfc8785.CanonicalizationError as error:
        raise LedgerError(
            f"the event's payload has no canonical JSON form: {error}",
            "Record such a value as text",
        ) from error


def event_hash(
    *,
    sequence: int,
    created_at: str,
    actor: str,
    action: str,
    subject_kind: str,
    subject_name: str,
    payload: str,
    previous_hash: str,
) -> str:
    """SHA-256, in hexadecimal, of the RFC 8785 form of the object of these eight fields.

    Args:
        payload: the payload's canonical JSON text; in the hashed object it stands as an object, not as text.
    """
    # The keys are in canonical order and the payload is canonical already, so the object is written out here: the
    # result is rfc8785.dumps of the object, and a chain of 100,000 events is checked in seconds.
    text = (
        f'{{"action":{_encode_string(action)},"actor":{_encode_string(actor)},'
        f'"created_at":{_encode_string(created_at)},"payload":{payload},'
        f'"previous_hash":{_encode_string(previous_hash)},"sequence":{sequence:d},'
        f'"subject_kind":{_encode_string(subject_kind)},"subject_name":{_encode_string(subject_name)}}}'
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_chain(events: Iterable[EventFields]) -> Iterator[Violation]:
    """Every break of the chain, in order. Nothing is yielded for a sound chain.

    Args:
        events: all events of the ledger by ascending sequence; read once.
    """
    expected, previous_hash = 1, GENESIS
    for event in events:
        sequence = event.sequence
        if sequence != expected:
            yield Violation(sequence, _sequence_problem(expected, sequence))
        elif event.previous_hash != previous_hash:
            # Behind a gap the previous hash is bound to differ; one finding is enough.
            yield Violation(sequence, f"event {sequence} does not continue event {sequence - 1}: previous_hash differs")
        if not is_canonical(event.payload):
            yield Violation(sequence, f"the payload of event {sequence} is not canonical JSON")
        elif event.hash != _hash_of(event):
            yield Violation(sequence, f"the content of event {sequence} does not have its hash")
        expected, previous_hash = sequence + 1, event.hash


def is_canonical(payload: str) -> bool:
    """Whether the text is a JSON object in RFC 8785 form."""
    exact = True

    def read_float(text: str) -> float:  # NaN and Infinity too, which rfc8785 then refuses
        nonlocal exact
        number = float(text)
        # Without an exponent the shortest decimal that reads back as the number is the form of both.
        if text != repr(number) or "e" in text or text.endswith(".0"):
            exact = False
        return number

    def read_integer(text: str) -> int | float:
        nonlocal exact
        number = int(text)
        if abs(number) > _LARGEST_EXACT_INTEGER:  # the canonical form of a large float has no point
            exact = False
            return float(number)
        return number

    try:
        value = json.loads(payload, parse_float=read_float, parse_int=read_integer, parse_constant=read_float)
        if not isinstance(value, dict):
            return False
        # Python's own encoder agrees with RFC 8785 but for some numbers, and for the order of keys and what may be
        # encoded beyond U+D7FF; and it is many times faster.
        if exact and (payload.isascii() or max(payload) < "\ud800"):
            return _encode_sorted(value) == payload
        return rfc8785.dumps(value) == payload.encode("utf-8")
    except (ValueError, OverflowError, RecursionError):
        return False


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


def _hash_of(event: EventFields) -> str:
    return event_hash(
        sequence=event.sequence,
        created_at=event.created_at,
        actor=event.actor,
        action=event.action,
        subject_kind=event.subject_kind,
        subject_name=event.subject_name,
        payload=event.payload,
        previous_hash=event.previous_hash,
    )


def _sequence_problem(expected: int, found: int) -> str:
    if found < expected:
        return f"event {found} comes after event {expected - 1}"
    missing = f"event {expected} is" if found == expected + 1 else f"events {expected} to {found - 1} are"
    return f"{missing} missing before event {found}"


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
