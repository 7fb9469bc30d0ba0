"""Rows to align on: preferences, judged answers or answers, read like prompt sets and made canonical."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import rfc8785

from algorithms.alignment_rows import AlignmentRow
from algorithms.alignment_settings import AlignmentMethod
from governance.data_sources import Row, matching_rows, text_of, value_of
from governance.errors import InputError, PromptSetError

PAIR = ("prompt", "chosen", "rejected")
COLUMNS: Mapping[AlignmentMethod, tuple[str, ...]] = {
    "dpo": PAIR,
    "orpo": PAIR,
    "kto": ("prompt", "completion", "label"),
    "sft": ("prompt", "response"),
}
"""What each method reads. Pairs serve kto too: the chosen answer is desirable, the rejected one is not."""

_TRUTH: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class AlignmentSource:
    """Where rows come from and how to read them.

    Attributes:
        location: a file, a saved dataset or a Hugging Face dataset, as for prompt sets.
        where: conditions that all must hold, as (field, value).
        columns: names of `COLUMNS` that are called otherwise in the source.
        limit: at most so many rows (after filtering), or None.
    """

    location: str
    where: tuple[tuple[str, str], ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class AlignmentData:
    """Rows that were read, in their order, with the SHA-256 of their canonical JSONL."""

    rows: tuple[AlignmentRow, ...]
    digest: str


def read_alignment_data(source: AlignmentSource, method: AlignmentMethod) -> AlignmentData:
    """Read and check the rows of a method.

    Raises:
        InputError: a renamed column is none that the method reads.
        PromptSetError: the source is missing or malformed, a column is missing, a text is empty or a label is none.
    """
    known = {*COLUMNS[method], *(PAIR if method == "kto" else ())}
    for name in source.columns:
        if name not in known:
            raise InputError(f"method {method} reads no column {name}", f"use {', '.join(sorted(known))} in --column")
    rows: list[AlignmentRow] = []
    digest = hashlib.sha256()
    for read, (number, row) in enumerate(matching_rows(source.location, source.where), start=1):
        for one in _rows(row, number, source, method):
            rows.append(one)
            digest.update(rfc8785.dumps(_content(one, method)) + b"\n")
        if read == source.limit:
            break
    return AlignmentData(tuple(rows), digest.hexdigest())


def _rows(row: Row, number: int, source: AlignmentSource, method: AlignmentMethod) -> Iterator[AlignmentRow]:
    def text(name: str) -> str:
        column = source.columns.get(name, name)
        found = text_of(row, column, number, source.location)
        if not found.strip():
            raise PromptSetError(
                f"{source.location}: row {number} has an empty {column}", "fill it or take the row out"
            )
        return found

    if method == "sft":
        yield AlignmentRow(text("prompt"), text("response"))
    elif method != "kto":
        yield AlignmentRow(text("prompt"), text("chosen"), rejected=text("rejected"))
    elif _is_pair(row, source):
        yield AlignmentRow(text("prompt"), text("chosen"))
        yield AlignmentRow(text("prompt"), text("rejected"), desirable=False)
    else:
        yield AlignmentRow(text("prompt"), text("completion"), desirable=_label(row, number, source))


def _is_pair(row: Row, source: AlignmentSource) -> bool:
    def has(name: str) -> bool:
        return name in source.columns or name in row

    return has("chosen") and has("rejected") and not has("completion")


def _label(row: Row, number: int, source: AlignmentSource) -> bool:
    column = source.columns.get("label", "label")
    value = value_of(row, column, number, source.location)
    found = _TRUTH.get(value.strip().lower() if isinstance(value, str) else value) if _is_plain(value) else None
    if found is None:
        raise PromptSetError(
            f"{source.location}: {column} of row {number} is neither true nor false",
            "write true for a good answer and false for a bad one",
        )
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _content(row: AlignmentRow, method: AlignmentMethod) -> dict[str, Any]:
    values: tuple[Any, ...] = (row.prompt, row.answer)
    if method == "kto":
        values += (row.desirable,)
    elif row.rejected is not None:
        values += (row.rejected,)
    return dict(zip(COLUMNS[method], values, strict=True))
