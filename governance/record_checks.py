"""Whether every record is what the ledger says of it.

An event holds the digests of the records that it made, moved or rests on (`registry.record_digests`). Each record is
compared with the last event that speaks of it, and each event that moved one with the event before: what was edited in
between shows, although the later event took the edit into its digest. Records without a digest are from before events
held them; what events say in words is compared with every record.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from governance.provenance import origin_digest
from governance.told_records import STATE_AFTER, ToldPatches, ToldRecords, event_payload
from registry import ledger, locks, queries
from registry.record_digests import (
    KINDS,
    dangling_rows,
    record_names,
    stored_records,
)
from registry.record_forms import Word
from registry.schema import Lineage, LineageLock, Model, Patch, ProtectedNeuron


@dataclass(frozen=True)
class Disagreement:
    """A record that is not what the ledger says of it."""

    subject: str
    problem: str


@dataclass(frozen=True)
class RecordCheck:
    """What the comparison of records with their digests came to.

    Attributes:
        disagreements: records that were edited, put in or taken out.
        compared: kind → how many records were compared.
        without_digest: kind → how many are from before the ledger held digests.
        readable: whether what the records refer to is there, and their times and JSON can be read.
    """

    disagreements: tuple[Disagreement, ...]
    compared: dict[str, int]
    without_digest: dict[str, int]
    readable: bool


def check_records(
    session: Session,
    events: Iterable[ledger.Event],
    lineage: str | None = None,
    chosen: Mapping[Word, AbstractSet[int]] | None = None,
) -> RecordCheck:
    """Compare every record with its digest. That what it refers to is there is checked of all records in any case.

    Args:
        session: a reading session.
        events: the whole ledger.
        lineage: compare only what the ledger tells of this lineage and `chosen`.
        chosen: kind → ids of what belongs to the lineage and what it rests on (`records_of_lineage`).
    """
    told = ToldRecords.by(events)
    ours = told.names(lineage)
    dangling = list(dangling_rows(session))
    readable = all(rows.table == ProtectedNeuron.__tablename__ for rows in dangling)  # claims are read without
    found = [
        Disagreement(f"{rows.table} with {rows.key}", f"there is no such row in {rows.missing}") for rows in dangling
    ]
    compared: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for kind in KINDS:
        names = record_names(session, kind)
        missing = {name for name in ours if name.startswith(f"{kind.word} ")} - set(names.values())
        found += [Disagreement(name, told.gone(name)) for name in sorted(missing)]
        ids = None
        if chosen is not None:
            ids = chosen[kind.word] | {identifier for identifier, name in names.items() if name in ours}
        for record in stored_records(session, kind, ids):
            known = record.name in told.digests or kind.word not in told.kinds_before
            (compared if known else without)[kind.words] += 1
            readable = readable and record.readable
            found += [Disagreement(record.name, problem) for problem in told.problems(record)]
    found += _idle_locks(session, lineage)
    return RecordCheck(tuple(found), dict(compared), dict(without), readable)


def check_registration(model: Model, events: Iterable[ledger.Event]) -> Iterator[Disagreement]:
    """What is recorded of a model's files is what the ledger says was registered."""
    subject = f"model {model.name}"
    told = [
        event_payload(event)
        for event in events
        if (event.action, event.subject_name) == ("model.registered", model.name)
    ]
    recorded = {
        "state_digest": model.state_digest,
        "path": model.path,
        "role": model.role,
        "files": {file.file: file.digest for file in model.files},
        "made_from": model.details.get("made_from"),
    }
    if not told:
        yield Disagreement(subject, "the ledger does not tell of its registration")
        return
    for name, value in recorded.items():
        if told[-1].get(name) != value:
            yield Disagreement(subject, f"its recorded {name} is not the registered one")


def check_states(session: Session, lineage: Lineage, events: Iterable[ledger.Event]) -> Iterator[Disagreement]:
    """What the ledger says became of each patch is what its record says, and the head's digest with it."""
    told = ToldPatches.by(events, lineage.name)
    patches = queries.list_patches(session, lineage.id)
    for patch in patches:
        action = told.actions.get(patch.sequence, "")
        if STATE_AFTER.get(action) != patch.state:
            yield Disagreement(
                f"patch {patch.sequence} of {lineage.name}",
                f"its record says {patch.state}, the ledger's last event {action or 'nothing'}",
            )
        yield from _compare_patch(lineage, patch, told.described.get(patch.sequence, {}))
    for sequence in told.actions.keys() - {patch.sequence for patch in patches}:
        yield Disagreement(f"patch {sequence} of {lineage.name}", "the ledger speaks of it, but it has no record")
    if told.digest not in (None, lineage.state_digest):
        yield Disagreement(f"lineage {lineage.name}", "its digest is not that of the ledger's last change")


def _compare_patch(lineage: Lineage, patch: Patch, payload: dict[str, Any]) -> Iterator[Disagreement]:
    subject = f"patch {patch.sequence} of {lineage.name}"
    recorded = {
        "artifact": patch.artifact_digest or "",
        "digest_before": patch.digest_before,
        "digest_after": patch.digest_after,
        "neurons_modified": patch.neurons_modified,
        "neurons_selected": patch.neurons_selected,
        "parameters_modified": patch.parameters_modified,
        "dimension": patch.dimension.name,
        "identification": patch.identification_id,
        "settings_digest": hashlib.sha256(ledger.canonical(patch.settings)).hexdigest(),
        "actor": patch.actor,
        "reason": patch.reason or "",
        "rows_unchanged": patch.rows_unchanged,
        "neurons_already_protected": patch.neurons_protected,
    }
    for name, value in recorded.items():
        if name in payload and payload[name] != value:
            yield Disagreement(subject, f"its record has {name} = {value}, the ledger {payload[name]}")
    if payload.get("provenance") != origin_digest(patch.origin):
        yield Disagreement(subject, "what its record says of where it came from is not what the ledger says")


def _idle_locks(session: Session, lineage: str | None) -> Iterator[Disagreement]:
    """Locks of lineages of which no patch is being written: nobody took them."""
    unfinished = select(Patch.lineage_id).where(Patch.state.in_(("applying", "reverting")))
    query = (
        select(Lineage.name, LineageLock)
        .join(LineageLock, LineageLock.lineage_id == Lineage.id)
        .where(Lineage.id.not_in(unfinished))
    )
    for name, lock in session.execute(query.order_by(Lineage.id)):
        if lineage in (None, name):
            who = f"process {lock.pid} on {locks.owner(lock).host}"
            yield Disagreement(f"lineage {name}", f"{who} holds its lock, though no patch of it is being written")
