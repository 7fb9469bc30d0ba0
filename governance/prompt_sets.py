"""Prompt sets: read from JSONL, CSV, Parquet or a Hugging Face dataset, filtered, checked, made canonical.

A prompt set is kept as canonical JSONL (one RFC 8785 object a line, fields `prompt` and, where an answer
is known, `answer`), so its SHA-256 speaks of the content alone, wherever it came from.
"""

import csv
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rfc8785

from governance.errors import PromptSetError

PROMPT_COLUMNS = ("prompt", "instruction", "question", "text", "goal", "behavior")
"""Where the prompt is looked for when no column is named."""

_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_FILE_LIKE = (*_LOCAL_SUFFIXES, ".txt", ".tsv", ".xlsx", ".gz")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One prompt, with the answer that belongs to it when one is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class PromptSource:
    """Where a prompt set comes from and how to read it.

    Attributes:
        location: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a directory written by
            `datasets.Dataset.save_to_disk`, or the name of a Hugging Face dataset (`owner/name`,
            `owner/name:split`).
        where: conditions that all must hold, as (field, value); a field may be a dotted path into
            nested objects, and a list matches when it holds the value.
        prompt_columns: columns joined by a line break to make the prompt; empty: the first known name.
        answer_column: column that holds the answer, or None.
        drop_duplicates: keep the first of repeated prompts instead of refusing the set.
        limit: keep at most so many prompts (after filtering), or None.
    """

    location: str
    where: tuple[tuple[str, str], ...] = ()
    prompt_columns: tuple[str, ...] = ()
    answer_column: str | None = None
    drop_duplicates: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class PromptSet:
    """A checked prompt set in its order of reading."""

    source: PromptSource
    rows: tuple[PromptRow, ...]
    dropped: int = 0
    canonical: bytes = field(default=b"", repr=False)

    def keys(self) -> dict[str, int]:
        """Return each prompt's comparison key with its row number (from 1)."""
        return {prompt_key(row.prompt): number for number, row in enumerate(self.rows, start=1)}


def prompt_key(prompt: str) -> str:
    """Return what two prompts are compared by: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def read_prompt_set(source: PromptSource) -> PromptSet:
    """Read, filter and check one prompt set.

    Raises:
        PromptSetError: the source is missing or malformed, a column is missing, nothing is left after
            the filter, or a prompt is empty or repeated.
    """
    rows: list[PromptRow] = []
    seen: dict[str, int] = {}
    read = dropped = 0
    fields: set[str] = set()
    for number, row in _read(source.location):
        read += 1
        fields.update(row)
        if not all(_matches(row, name, value, source.location) for name, value in source.where):
            continue
        prompt_row = _prompt_row(row, number, source)
        key = prompt_key(prompt_row.prompt)
        if key in seen:
            if not source.drop_duplicates:
                raise PromptSetError(
                    f"{source.location}: row {number} repeats the prompt of row {seen[key]}",
                    "take the repetition out, or pass --drop-duplicates to keep the first of each",
                )
            dropped += 1
            continue
        seen[key] = number
        rows.append(prompt_row)
        if source.limit is not None and len(rows) >= source.limit:
            break
    if not rows:
        raise PromptSetError(*_emptiness(source, read, fields))
    return PromptSet(source=source, rows=tuple(rows), dropped=dropped, canonical=canonical_rows(rows))


def canonical_rows(rows: Iterable[PromptRow]) -> bytes:
    """Return the canonical JSONL of prompt rows: what is stored, and what the digest is taken of."""
    lines = []
    for row in rows:
        content: dict[str, Any] = {"prompt": row.prompt}
        if row.answer is not None:
            content["answer"] = row.answer
        lines.append(rfc8785.dumps(content) + b"\n")
    return b"".join(lines)


def parse_canonical(content: bytes) -> tuple[PromptRow, ...]:
    """Return the rows of a canonical JSONL document."""
    rows = []
    for line in content.splitlines():
        fields = json.loads(line)
        rows.append(PromptRow(prompt=fields["prompt"], answer=fields.get("answer")))
    return tuple(rows)


def require_disjoint(sets: Sequence[tuple[str, PromptSet]]) -> None:
    """Refuse a prompt that stands in two sets of one dimension (harmful and benign, or held out and not).

    Raises:
        PromptSetError: naming both sets and the row numbers.
    """
    seen: dict[str, tuple[str, int]] = {}
    for label, prompt_set in sets:
        for key, number in prompt_set.keys().items():
            if key in seen:
                other, other_number = seen[key]
                raise PromptSetError(
                    f"prompt {number} of the {label} set {prompt_set.source.location} is also prompt "
                    f"{other_number} of the {other} set",
                    f"keep it in one of them: a prompt cannot be both {other} and {label}",
                )
        seen.update({key: (label, number) for key, number in prompt_set.keys().items()})


def _emptiness(source: PromptSource, read: int, fields: set[str]) -> tuple[str, str]:
    if read == 0:
        return f"{source.location} holds no rows", "give a file with at least one prompt"
    conditions = ", ".join(f"{name}={value}" for name, value in source.where)
    return (
        f"none of the {read} rows of {source.location} has {conditions}",
        f"check the condition against the fields {', '.join(sorted(fields))}",
    )


def _prompt_row(row: Row, number: int, source: PromptSource) -> PromptRow:
    columns = source.prompt_columns or _known_column(row, number, source.location)
    parts = [_text(row, column, number, source.location) for column in columns]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise PromptSetError(
            f"{source.location}: row {number} has an empty prompt", "take the row out or fill its prompt"
        )
    answer = None
    if source.answer_column is not None:
        answer = _text(row, source.answer_column, number, source.location)
        if not answer.strip():
            raise PromptSetError(
                f"{source.location}: row {number} has an empty {source.answer_column}",
                "fill it, or leave the answer column out so that the aligned model answers",
            )
    return PromptRow(prompt=prompt, answer=answer)


def _known_column(row: Row, number: int, location: str) -> tuple[str, ...]:
    for column in PROMPT_COLUMNS:
        if column in row:
            return (column,)
    raise PromptSetError(
        f"{location}: row {number} has none of the columns {', '.join(PROMPT_COLUMNS)}",
        f"name the prompt's column with --prompt-column; the row has {', '.join(row) or 'no columns'}",
    )


def _text(row: Row, column: str, number: int, location: str) -> str:
    value = _lookup(row, column)
    if value is None and column not in row:
        raise PromptSetError(
            f"{location}: row {number} has no column {column}", f"name one of {', '.join(row) or 'its columns'}"
        )
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptSetError(
            f"{location}: {column} of row {number} is {type(value).__name__}, not text", "name a text column"
        )
    return value


def _lookup(row: Row, path: str) -> Any:
    """Return the value at a dotted path; a key that holds the dots itself comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _matches(row: Row, name: str, wanted: str, location: str) -> bool:
    if name.split(".", maxsplit=1)[0] not in row and name not in row:
        raise PromptSetError(
            f"{location} has no field {name}", f"use one of the fields {', '.join(sorted(row))} in --where"
        )
    value = _lookup(row, name)
    values = value if isinstance(value, list) else [value]
    return any(_as_text(item) == wanted for item in values)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _read(location: str) -> Iterator[tuple[int, Row]]:
    path = Path(location)
    suffix = path.suffix.lower()
    if suffix in _LOCAL_SUFFIXES:
        if not path.is_file():
            raise PromptSetError(f"{location} does not exist", "check the path of the prompt file")
        yield from _LOCAL_READERS[suffix](path)
    elif path.is_dir():
        yield from _read_saved_dataset(path)
    elif path.exists() or suffix in _FILE_LIKE or location.startswith((".", "/", "~")):
        state = "is not of a known format" if path.exists() else "does not exist"
        raise PromptSetError(f"{location} {state}", f"give a file that ends in {', '.join(_LOCAL_SUFFIXES)}")
    else:
        yield from _read_hub(location)


def _read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with _open_text(path) as stream:
        for number, line in enumerate(_decoded(stream, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise PromptSetError(
                    f"{path}: line {number} is not JSON ({error.msg})", "write one JSON object a line"
                ) from error
            yield number, _require_object(row, path, number)


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    with _open_text(path) as stream:
        content = "".join(_decoded(stream, path))
    try:
        rows = json.loads(content)
    except json.JSONDecodeError:
        yield from _read_json_lines(path)
        return
    if not isinstance(rows, list):
        rows = [rows]
    for number, row in enumerate(rows, start=1):
        yield number, _require_object(row, path, number)


def _require_object(row: Any, path: Path, number: int) -> Row:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        raise PromptSetError(f"{path}: row {number} is not an object", "write one JSON object a line")
    return row


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with _open_text(path) as stream:
        reader = csv.DictReader(_decoded(stream, path), strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise PromptSetError(
                        f"{path}: row {number} has another number of fields than the header", "mend or quote the row"
                    )
                yield number, row
        except csv.Error as error:
            raise PromptSetError(f"{path}: line {reader.line_num} is not CSV ({error})", "mend the line") from error


def _open_text(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise PromptSetError(
            f"{path} cannot be read ({error.strerror})", "check the file and its permissions"
        ) from error


def _decoded(stream: Any, path: Path) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError as error:
        raise PromptSetError(f"{path} is not UTF-8 text", "save the file as UTF-8") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        batches = table.iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise PromptSetError(f"{path} is not a Parquet file", "check the file, or write it again") from error


def _read_saved_dataset(path: Path) -> Iterator[tuple[int, Row]]:
    from datasets import Dataset, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise PromptSetError(
            f"{path} is a directory that holds no saved dataset", "write it with datasets.Dataset.save_to_disk"
        ) from error
    if not isinstance(dataset, Dataset):
        raise PromptSetError(
            f"{path} holds the splits {', '.join(dataset)}", "name the directory of one split, not of all"
        )
    yield from enumerate(dataset, start=1)


def _read_hub(location: str) -> Iterator[tuple[int, Row]]:
    from datasets import load_dataset

    name, _, split = location.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptSetError(
            f"{location} is neither a file here nor a Hugging Face dataset that can be loaded ({first_line})",
            "check the path or the dataset's name and split (owner/name:split)",
        ) from error
    yield from enumerate(dataset, start=1)


_LOCAL_READERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
