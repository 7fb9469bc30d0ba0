"""The digest of a record: what an event says of it, and what shows that it was edited behind the ledger's back.

A record is a row and the rows that belong to it: a patch with what it did to each module, a model with its files,
tensors and modules. Its digest is the SHA-256 of those rows as they are stored: one line of JSON for each table that
holds some, its own first, then the others in the order of `KINDS`. A line is `["TABLE",{"COLUMN":value,…},…]`, the rows
by primary key, the columns by name and without those that are NULL, so that a later schema may add columns that are
NULL in older records. JSON and times are texts, truths 0 or 1, floats have the fewest digits that name them.

Claims (`protected_neurons`) are in no digest: they run to millions, and stand in the patch artifacts too.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ColumnElement,
    CompoundSelect,
    Integer,
    String,
    Table,
    Text,
    except_,
    func,
    literal,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.types import NullType

from registry.columns import Timestamp, parse_timestamp
from registry.record_forms import StoredRecord, Word
from registry.schema import (
    Approval,
    Base,
    Evaluation,
    GateResult,
    Identification,
    IdentificationPromptSet,
    IdentifiedNeuron,
    LayerScore,
    Lineage,
    LineageFile,
    LineageTensor,
    Model,
    ModelFile,
    ModelModule,
    ModelTensor,
    Patch,
    PatchModule,
    Policy,
    PromptSet,
    ProtectedDirection,
    SafetyDimension,
    TrainedJudge,
)

Record = Model | SafetyDimension | PromptSet | Lineage | Identification | Patch | Evaluation | TrainedJudge | Policy

_CHUNK = 2_000
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=repr).encode


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    Attributes:
        word: what one of its records is called.
        words: what several are called.
        row: the table of their own rows, whose key is `id`.
        label: SQL of what tells one from another, after the word.
        parts: columns of other tables that hold the id of the record that a row belongs to.
    """

    word: Word
    words: str
    row: type[Record]
    label: ColumnElement[str]
    parts: tuple[InstrumentedAttribute[int], ...] = ()


def _text(column: Any) -> ColumnElement[str]:
    return sql_cast(column, String)


_LINEAGE_OF_PATCH = select(Lineage.name).where(Lineage.id == Patch.lineage_id).scalar_subquery()

KINDS = (
    Kind("model", "models", Model, _text(Model.name), (ModelFile.model_id, ModelTensor.model_id, ModelModule.model_id)),
    Kind("dimension", "dimensions", SafetyDimension, _text(SafetyDimension.name)),
    Kind("prompt set", "prompt sets", PromptSet, _text(PromptSet.id)),
    Kind("lineage", "lineages", Lineage, _text(Lineage.name), (LineageFile.lineage_id, LineageTensor.lineage_id)),
    Kind(
        "identification",
        "identifications",
        Identification,
        _text(Identification.id),
        (
            IdentificationPromptSet.identification_id,
            LayerScore.identification_id,
            IdentifiedNeuron.identification_id,
        ),
    ),
    Kind(
        "patch",
        "patches",
        Patch,
        _text(Patch.sequence) + " of " + func.coalesce(_LINEAGE_OF_PATCH, "no lineage"),
        (PatchModule.patch_id, Approval.patch_id, ProtectedDirection.patch_id, GateResult.patch_id),
    ),
    Kind("evaluation", "evaluations", Evaluation, _text(Evaluation.id)),
    Kind("judge", "judges", TrainedJudge, _text(TrainedJudge.name)),
    Kind("policy", "policies", Policy, _text(Policy.id)),
)


def record_digests(session: Session, records: Iterable[Record]) -> dict[str, str]:
    """Name → digest of records as they are now in the session's transaction; what is pending is flushed first."""
    session.flush()
    wanted: dict[type[Record], set[int]] = {}
    for record in records:
        wanted.setdefault(type(record), set()).add(record.id)
    return {
        stored.name: stored.digest
        for kind in KINDS
        if kind.row in wanted
        for stored in stored_records(session, kind, wanted[kind.row])
    }


def record_names(session: Session, kind: Kind, ids: Collection[int] | None = None) -> dict[int, str]:
    """Id → name of the records of a kind, all of them or those of the given ids."""
    query = select(kind.row.id, kind.label.label("label")).order_by(kind.row.id)
    return {identifier: f"{kind.word} {label}" for identifier, label in _rows(session, query, kind.row.id, ids)}


def stored_records(session: Session, kind: Kind, ids: Collection[int] | None = None) -> Iterator[StoredRecord]:
    """The records of a kind by id, all of them or those of the given ids. Each table is read once, row by row."""
    names = record_names(session, kind, ids)
    digests = {identifier: hashlib.sha256() for identifier in names}
    unreadable: set[int] = set()
    for owner in (kind.row.id, *kind.parts):
        for identifier, piece, readable in _pieces(session, owner, ids):
            if identifier not in digests:
                continue  # it belongs to no record: `dangling_rows` names it
            digests[identifier].update(piece.encode("utf-8", "surrogatepass"))
            if not readable:
                unreadable.add(identifier)
    for identifier, name in names.items():
        yield StoredRecord(kind.word, name, digests[identifier].hexdigest(), identifier not in unreadable)


def _pieces(
    session: Session, owner: InstrumentedAttribute[int], ids: Collection[int] | None
) -> Iterator[tuple[int, str, bool]]:
    """A table's lines of JSON, one for each record, in pieces: the record's id, text, whether what it says is read."""
    columns = _columns(owner)
    titles = [column.name for column in columns]
    checks = [(number, check) for number, column in enumerate(columns) if (check := _check_of(column)) is not None]
    stored = _stored(session, owner, ids)
    for identifier, rows in groupby(stored, itemgetter(titles.index(owner.key))):
        yield identifier, f'["{owner.class_.__tablename__}"', True
        while chunk := list(islice(rows, _CHUNK)):
            held = [_held(titles, row) for row in chunk]
            readable = all(check(row[number]) for number, check in checks for row in chunk)
            yield identifier, f",{_encode(held)[1:-1]}", readable
        yield identifier, "]\n", True


def stored_rows(
    session: Session, owner: InstrumentedAttribute[int], ids: Collection[int] | None = None
) -> Iterator[bytes]:
    """The rows of a table of a kind in the JSON that is hashed, by the id of the record and within it by primary key.

    Args:
        session: reads.
        owner: the column of the table that holds the record's id: `id`, or one of the kind's parts.
        ids: of the records; all if left out.
    """
    titles = [column.name for column in _columns(owner)]
    for row in _stored(session, owner, ids):
        yield _encode(_held(titles, row)).encode("utf-8", "surrogatepass")


def _columns(owner: InstrumentedAttribute[int]) -> list[Column[Any]]:
    table: Table = owner.class_.__table__
    return sorted(table.c, key=lambda column: column.name)


def _held(titles: Iterable[str], row: Iterable[Any]) -> dict[str, Any]:
    return {title: value for title, value in zip(titles, row, strict=True) if value is not None}


def _stored(session: Session, owner: InstrumentedAttribute[int], ids: Collection[int] | None) -> Iterator[Any]:
    """The values of a table's rows as they are stored, by the id of the record and within it by primary key."""
    table: Table = owner.class_.__table__
    place = table.c[owner.key]
    query = select(*(_as_stored(session, column) for column in _columns(owner)))
    query = query.order_by(place, *(_by_bytes(session, column) for column in table.primary_key))
    if owner.class_ is IdentifiedNeuron:
        query = query.execution_options(yield_per=_CHUNK)  # they run to millions
    return chain.from_iterable(_rows(session, query, place, ids).partitions(_CHUNK))


def records_of_lineage(session: Session, lineage_id: int) -> dict[Word, set[int]]:
    """Ids, by kind, of a lineage's records and of those that they rest on: models, dimensions and prompt sets."""
    found: dict[Word, set[int]] = {kind.word: set() for kind in KINDS}
    found["lineage"] = {lineage_id}
    for kind in KINDS:
        columns = _table(kind.row).c
        if "lineage_id" not in columns or "dimension_id" not in columns:
            continue
        rows = session.execute(select(columns.id, columns.dimension_id).where(columns.lineage_id == lineage_id)).all()
        found[kind.word] = {row.id for row in rows}
        found["dimension"] |= {row.dimension_id for row in rows if row.dimension_id is not None}
    judged_by = select(Patch.policy_id).where(Patch.lineage_id == lineage_id, Patch.policy_id.is_not(None))
    everywhere = or_(Policy.lineage_id.is_(None), Policy.lineage_id == lineage_id, Policy.id.in_(judged_by))
    found["policy"] = set(session.scalars(select(Policy.id).where(everywhere)))
    paired = select(Lineage.subject_id, Lineage.aligned_id, Lineage.base_id).where(Lineage.id == lineage_id)
    models = set(session.execute(paired).one())
    measured = session.scalars(select(Evaluation.model_id).where(Evaluation.lineage_id == lineage_id))
    models |= {identifier for identifier in measured if identifier is not None}
    by = select(Evaluation.judge, Evaluation.judge_version).where(Evaluation.lineage_id == lineage_id).distinct()
    judged = {tuple(row) for row in session.execute(by)}
    for judge in session.scalars(select(TrainedJudge)):
        if (judge.name, judge.version) in judged:
            found["judge"].add(judge.id)
            models |= {judge.encoder_model_id} if judge.encoder_model_id is not None else set()
    below = session.scalars(select(Model.base_model_id).where(Model.id.in_(models)))
    found["model"] = models | {identifier for identifier in below if identifier is not None}
    read = (
        select(PromptSet.id).where(PromptSet.dimension_id.in_(found["dimension"])),
        select(Evaluation.prompt_set_id).where(Evaluation.lineage_id == lineage_id),
        select(IdentificationPromptSet.prompt_set_id).where(
            IdentificationPromptSet.identification_id.in_(found["identification"])
        ),
    )
    found["prompt set"] = {
        identifier for query in read for identifier in session.scalars(query) if identifier is not None
    }
    return found


@dataclass(frozen=True)
class DanglingRows:
    """Rows of a table whose foreign key names no row, as no database would let it with its constraints on.

    Attributes:
        table: where they are.
        key: the columns of the key with their values.
        missing: the table that has no such row.
    """

    table: str
    key: str
    missing: str


def dangling_rows(session: Session) -> Iterator[DanglingRows]:
    """Every value of a foreign key, of any table, that names no row."""
    for number, *values in session.execute(_dangling()):
        constraint = _FOREIGN_KEYS[number]
        key = ", ".join(f"{column.name} {value}" for column, value in zip(constraint.columns, values, strict=False))
        yield DanglingRows(constraint.table.name, key, constraint.referred_table.name)


_FOREIGN_KEYS = tuple(
    constraint
    for table in Base.metadata.sorted_tables
    for constraint in sorted(table.foreign_key_constraints, key=lambda held: str(held.name))
)


@cache
def _dangling() -> CompoundSelect[Any]:
    """The place of each foreign key in `_FOREIGN_KEYS` with the values, as text, that name no row; two at most."""
    found = []
    for number, constraint in enumerate(_FOREIGN_KEYS):
        columns = list(constraint.columns)
        present = select(*columns).where(*(column.is_not(None) for column in columns))
        lost = except_(present, select(*(element.column for element in constraint.elements))).subquery()
        values = [_text(column) for column in lost.c]
        found.append(select(literal(number), *values, *[_text(null())] * (2 - len(values))))
    return union_all(*found)


def _table(row: type[Base]) -> Table:
    return cast("Table", row.__table__)  # every mapped class here has one table


def _rows(session: Session, query: Any, owner: Any, ids: Collection[int] | None) -> Any:
    if ids is not None:
        query = query.where(owner.in_(ids))
    return session.execute(query)


def _as_stored(session: Session, column: Column[Any]) -> ColumnElement[Any]:
    """A column's value without what SQLAlchemy or the driver makes of it, alike on both databases."""
    if isinstance(column.type, JSON):
        return sql_cast(column, Text)
    if isinstance(column.type, Boolean) and session.get_bind().dialect.name == "postgresql":
        return sql_cast(column, Integer)
    return type_coerce(column, NullType())


def _by_bytes(session: Session, column: Column[Any]) -> ColumnElement[Any]:
    """A column to order by: text by its bytes, whatever the database's language is."""
    if isinstance(column.type, String) and session.get_bind().dialect.name == "postgresql":
        return column.collate("C")
    return column


def _check_of(column: Column[Any]) -> Callable[[Any], bool] | None:
    """What tells whether the rest of the program can read a column's value."""
    if isinstance(column.type, Timestamp):
        return _is_timestamp
    if isinstance(column.type, JSON):
        return _is_list if column.name == "shape" else _is_object
    return None


def _is_timestamp(value: Any) -> bool:
    try:
        return value is None or parse_timestamp(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_object(value: Any) -> bool:
    return value is None or isinstance(_parsed(value), dict)


def _is_list(value: Any) -> bool:
    found = _parsed(value)
    return isinstance(found, list) and all(type(item) is int for item in found)


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value)
    except (RecursionError, TypeError, ValueError):
        return None
