"""Rows of text: read from JSONL, JSON, CSV, Parquet, a saved dataset or a Hugging Face dataset, and filtered."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from governance.errors import PromptSetError

_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_FILE_LIKE = (*_LOCAL_SUFFIXES, ".txt", ".tsv", ".xlsx", ".gz")
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:.+)?", re.ASCII)

Row = Mapping[str, Any]


def matching_rows(location: str, where: Sequence[tuple[str, str]] = ()) -> Iterator[tuple[int, Row]]:
    """The rows for which every condition holds, each with its number (from 1) in the source.

    Args:
        location: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a directory written by
            `datasets.Dataset.save_to_disk`, or the name of a Hugging Face dataset (`owner/name`,
            `owner/name:split`).
        where: (field, value); a field may be a dotted path into nested objects, and a list matches when it holds the
            value.

    Raises:
        PromptSetError: the source is missing or malformed, lacks a field of a condition, or has no such row.
    """
    read = matched = 0
    fields: set[str] = set()
    for number, row in _read(location):
        read += 1
        fields.update(row)
        if all(matches(row, name, value, location) for name, value in where):
            matched += 1
            yield number, row
    if read == 0:
        raise PromptSetError(f"{location} holds no rows", "give a file with at least one row")
    if matched == 0:
        conditions = ", ".join(f"{name}={value}" for name, value in where)
        raise PromptSetError(
            f"none of the {read} rows of {location} has {conditions}",
            f"check the condition against the fields {', '.join(sorted(fields))}",
        )


def text_of(row: Row, column: str, number: int, location: str) -> str:
    """The text in a column, or at a dotted path; empty where it holds null.

    Raises:
        PromptSetError: there is no such column, or it holds no text.
    """
    value = value_of(row, column, number, location)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptSetError(
            f"{location}: {column} of row {number} is {type(value).__name__}, not text", "name a text column"
        )
    return value


def value_of(row: Row, column: str, number: int, location: str) -> Any:
    """What stands in a column, or at a dotted path.

    Raises:
        PromptSetError: there is no such column.
    """
    value = _lookup(row, column)
    if value is None and column not in row:
        raise PromptSetError(
            f"{location}: row {number} has no column {column}", f"name one of {', '.join(row) or 'its columns'}"
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


def matches(row: Row, name: str, wanted: str, location: str) -> bool:
    """Whether a row meets a condition, as `matching_rows` takes it.

    Raises:
        PromptSetError: there is no such field.
    """
    if name.split(".", maxsplit=1)[0] not in row and name not in row:
        raise PromptSetError(
            f"{location} has no field {name}", f"use one of the fields {', '.join(sorted(row))} in --where"
        )
    value = _lookup(row, name)
    values = value if isinstance(value, list) else [value]
    return any(as_text(item) == wanted for item in values)


def as_text(value: Any) -> str:
    """A value as conditions are written: truths as `true` and `false`, null as nothing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _read(location: str) -> Iterator[tuple[int, Row]]:
    path = Path(location)
    suffix = path.suffix.lower()
    if suffix in _LOCAL_SUFFIXES:
        if not path.is_file():
            raise PromptSetError(f"{location} does not exist", "check the path of the file")
        yield from _LOCAL_READERS[suffix](path)
    elif path.is_dir():
        yield from _read_saved_dataset(path)
    elif path.exists() or suffix in _FILE_LIKE or _ON_THE_HUB.fullmatch(location) is None:
        state = "is not of a known format" if path.exists() else "does not exist"
        raise PromptSetError(
            f"{location} {state}",
            f"give a file that ends in {', '.join(_LOCAL_SUFFIXES)}, or a Hugging Face dataset as owner/name:split",
        )
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
