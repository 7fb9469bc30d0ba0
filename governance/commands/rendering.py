"""How results are shown: one table described once, printed for people, as JSON or as CSV."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table for people; columns named in `right` are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = column in right
        view.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        view.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console(soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(view)


def emit_list(items: Sequence[Any], as_json: bool, as_csv: bool, people: Callable[[], None]) -> None:
    """Print a list of records as JSON, as CSV or, by calling `people`, as a table."""
    if as_json:
        click.echo(json.dumps([plain(item) for item in items], indent=2, ensure_ascii=False))
    elif as_csv:
        records = [plain(item) for item in items]
        names = list(records[0] if records else ())
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        for record in records:
            writer.writerow([_cell(record.get(name)) for name in names])
    else:
        people()


def emit_records(item: Any, records: Sequence[Any], as_json: bool, as_csv: bool, people: Callable[[], None]) -> None:
    """Print a result that has a list of records: whole as JSON or by calling `people`, the list alone as CSV."""
    if as_csv:
        emit_list(records, False, True, people)
    else:
        emit(item, as_json, people)


def emit(item: Any, as_json: bool, people: Callable[[], None]) -> None:
    """Print one result as JSON or, by calling `people`, in sentences and tables."""
    if as_json:
        click.echo(json.dumps(plain(item), indent=2, ensure_ascii=False))
    else:
        people()


def plain(value: Any) -> Any:
    """Return a value in the types of JSON: records become objects, times ISO 8601, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value


def percent(share: float, digits: int = 2) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def size(count: float) -> str:
    """Return a number of bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
