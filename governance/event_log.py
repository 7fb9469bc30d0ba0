"""The ledger's events, and which of them are about a lineage, a dimension, a model or a module.

What the database can tell by columns or by a word in the payload's text it tells; what is left is read and looked at
closely. Payloads are canonical JSON, so `"dimension":"terrorism"` stands there letter for letter or not at all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from governance.moments import Moment
from governance.told_records import event_payload
from governance.workspace import Workspace
from registry import ledger, queries
from registry.errors import RecordNotFoundError
from registry.schema import LedgerEvent, Lineage, Patch, PatchModule, SafetyDimension


@dataclass(frozen=True, slots=True)
class EventSummary:
    """One ledger event with its payload as an object."""

    sequence: int
    created_at: str
    actor: str
    action: str
    subject_kind: str
    subject_name: str
    payload: dict[str, Any]
    hash: str


@dataclass(frozen=True)
class LogQuery:
    """Which events are wanted; all that is given has to hold.

    Attributes:
        actions: prefixes of actions, one of which is the event's.
        actor: who acted.
        subject: name of the model, dimension or lineage that the event is of.
        since, until: the event is not before the beginning of the one, nor after the end of the other.
        lineage: the event is of this lineage.
        dimension: it is of this dimension: its registration, identifications, patches and figures of evaluations.
        model: it is of this model, or of a lineage whose subject this is.
        module: it is of a patch that touched this module (or, of several lineages, one of that name).
        newest_first: in descending order.
        limit: at most so many.
    """

    actions: tuple[str, ...] = ()
    actor: str | None = None
    subject: str | None = None
    since: Moment | None = None
    until: Moment | None = None
    lineage: str | None = None
    dimension: str | None = None
    model: str | None = None
    module: str | None = None
    newest_first: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class _Topic:
    """What an event has to be about: what the database can check of that, and the rest."""

    where: ColumnElement[bool]
    holds: Callable[[ledger.Event, dict[str, Any]], bool]


def audit_log(workspace: Workspace, query: LogQuery | None = None) -> list[EventSummary]:
    """Return the ledger's events that a query asks for, in order.

    Raises:
        RecordNotFoundError: no lineage, dimension, model or module of that name, or no event at all with that action,
            actor or subject; the message lists the nearest.
    """
    query = query or LogQuery()
    with workspace.registry.read() as session:
        topics = list(_topics(session, query))
        where = [*_conditions(session, query), *(topic.where for topic in topics)]
        found = _matching(ledger.events(session, where=where, newest_first=query.newest_first), topics)
        return list(islice(found, query.limit))


def _matching(events: Iterator[ledger.Event], topics: list[_Topic]) -> Iterator[EventSummary]:
    for event in events:
        payload = event_payload(event)
        if all(topic.holds(event, payload) for topic in topics):
            yield EventSummary(
                sequence=event.sequence,
                created_at=event.created_at,
                actor=event.actor,
                action=event.action,
                subject_kind=event.subject_kind,
                subject_name=event.subject_name,
                payload=payload,
                hash=event.hash,
            )


def _conditions(session: Session, query: LogQuery) -> Iterator[ColumnElement[bool]]:
    if query.actions:
        # Not LIKE, which takes capitals for small letters in SQLite.
        begin = [func.substr(LedgerEvent.action, 1, len(action)) == action for action in query.actions]
        for action, condition in zip(query.actions, begin, strict=True):
            _require_known(session, condition, LedgerEvent.action, "of action", action)
        yield or_(*begin)
    if query.actor is not None:
        condition = LedgerEvent.actor == query.actor
        _require_known(session, condition, LedgerEvent.actor, "by", query.actor)
        yield condition
    if query.subject is not None:
        condition = LedgerEvent.subject_name == query.subject
        _require_known(session, condition, LedgerEvent.subject_name, "of", query.subject)
        yield condition
    if query.since is not None:
        yield LedgerEvent.created_at >= query.since.first
    if query.until is not None:
        yield LedgerEvent.created_at <= query.until.last


def _require_known(
    session: Session, condition: ColumnElement[bool], column: InstrumentedAttribute[str], word: str, name: str
) -> None:
    """Refuse what the ledger never saw: a misspelt name would otherwise look like one that did nothing."""
    if session.scalar(select(LedgerEvent.sequence).where(condition).limit(1)) is not None:
        return
    known = sorted(session.scalars(select(column).distinct()))
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    mend = f"Did you mean {', '.join(near)}" if near else f"Name one of {', '.join(known[:8])}"
    if not known:
        mend = "The ledger is empty: register something first"
    raise RecordNotFoundError(f"the ledger holds no event {word} {name!r}", mend)


def _topics(session: Session, query: LogQuery) -> Iterator[_Topic]:
    if query.lineage is not None:
        lineage = queries.get_lineage(session, query.lineage)
        yield _plain(_of("lineage", lineage.name))
    if query.model is not None:
        model = queries.get_model(session, query.model)
        lineages = select(Lineage.name).where(Lineage.subject_id == model.id)
        of_lineage = and_(LedgerEvent.subject_kind == "lineage", LedgerEvent.subject_name.in_(lineages))
        yield _plain(or_(_of("model", model.name), of_lineage))
    if query.dimension is not None:
        yield _dimension_topic(session, queries.get_dimension(session, query.dimension))
    if query.module is not None:
        yield _module_topic(session, query.module, query.lineage)


def _plain(where: ColumnElement[bool]) -> _Topic:
    return _Topic(where, lambda _event, _payload: True)


def _dimension_topic(session: Session, dimension: SafetyDimension) -> _Topic:
    name = dimension.name
    patches = _patches(session, Patch.dimension_id == dimension.id)

    def holds(event: ledger.Event, payload: dict[str, Any]) -> bool:
        figures = payload.get("figures") or ()
        return (
            (event.subject_kind, event.subject_name) == ("dimension", name)
            or payload.get("dimension") == name
            or any(figure.get("dimension") == name for figure in figures if isinstance(figure, dict))
            or _speaks_of(patches, event, payload)
        )

    written = f'"dimension":{json.dumps(name, ensure_ascii=False)}'
    where = or_(_of("dimension", name), LedgerEvent.payload.contains(written, autoescape=True), _of_a_patch(patches))
    return _Topic(where, holds)


def _module_topic(session: Session, name: str, lineage: str | None) -> _Topic:
    """Events of the patches that touched a module, in one lineage or in all that have one of that name."""
    named = [queries.get_lineage(session, lineage)] if lineage else list(queries.list_lineages(session))
    having = [record for record in named if queries.modules_named(session, record, name)]
    touching: set[tuple[str, int]] = set()
    for record in having or named[:1]:
        module = queries.get_module(session, record, name)
        changed = select(PatchModule.patch_id).where(PatchModule.module_id == module.id)
        touching |= _patches(session, and_(Patch.lineage_id == record.id, Patch.id.in_(changed)))
    return _Topic(_of_a_patch(touching), lambda event, payload: _speaks_of(touching, event, payload))


def _patches(session: Session, where: ColumnElement[bool]) -> set[tuple[str, int]]:
    """Lineage and number of the patches for which a condition holds."""
    query = select(Lineage.name, Patch.sequence).join(Patch, Patch.lineage_id == Lineage.id).where(where)
    return {(lineage, sequence) for lineage, sequence in session.execute(query)}


def _of(kind: str, name: str) -> ColumnElement[bool]:
    return and_(LedgerEvent.subject_kind == kind, LedgerEvent.subject_name == name)


def _of_a_patch(patches: set[tuple[str, int]]) -> ColumnElement[bool]:
    lineages = {lineage for lineage, _ in patches}
    return and_(
        LedgerEvent.subject_kind == "lineage",
        LedgerEvent.subject_name.in_(lineages),
        LedgerEvent.payload.contains('"patch":'),
    )


def _speaks_of(patches: set[tuple[str, int]], event: ledger.Event, payload: dict[str, Any]) -> bool:
    patch = payload.get("patch")
    return event.subject_kind == "lineage" and isinstance(patch, int) and (event.subject_name, patch) in patches
