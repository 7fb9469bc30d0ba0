"""Many rows at once: claims and identified neurons run to millions."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from sqlalchemy import ARRAY, Table, bindparam, column, func, insert, select
from sqlalchemy.orm import Session

from registry.schema import Base

CHUNK = 2_000


def insert_rows(session: Session, table: type[Base], rows: Iterable[Mapping[str, Any]]) -> int:
    """Insert rows, given as column name → value, in chunks. All rows have the same columns, none of them JSON.

    Returns:
        how many rows were inserted.

    Raises:
        sqlalchemy.exc.IntegrityError: a constraint refuses a row; `Registry.write` turns it into its own error.
    """
    session.flush()
    core = _core_table(table)
    count = 0
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        if session.get_bind().dialect.name == "postgresql":
            _insert_arrays(session, core, chunk)
        else:
            session.execute(insert(core), chunk)
        count += len(chunk)
    return count


def _insert_arrays(session: Session, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """`INSERT … SELECT * FROM unnest(…)`: one statement for the chunk instead of one per row."""
    names = list(rows[0])
    arrays = [
        bindparam(f"values_{name}", [row[name] for row in rows], type_=ARRAY(table.c[name].type)) for name in names
    ]
    source = (
        func.unnest(*arrays)
        .table_valued(*(column(name, table.c[name].type) for name in names), name="source")
        .render_derived()
    )
    session.execute(insert(table).from_select(names, select(*(source.c[name] for name in names))))


def _core_table(table: type[Base]) -> Table:
    return cast("Table", table.__table__)  # every mapped class here has one table
