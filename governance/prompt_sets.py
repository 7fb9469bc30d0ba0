"""Prompt sets: read, filtered, checked, made canonical.

A prompt set is kept as canonical JSONL (one RFC 8785 object a line, fields `prompt` and, where an answer
is known, `answer`), so its SHA-256 speaks of the content alone, wherever it came from.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import rfc8785

from governance.data_sources import Row, matching_rows, text_of
from governance.errors import PromptSetError

PROMPT_COLUMNS = ("prompt", "instruction", "question", "text", "goal", "behavior")
"""Where the prompt is looked for when no column is named."""


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
    dropped = 0
    for number, row in matching_rows(source.location, source.where):
        prompt_row = _prompt_row(row, number, source)
        key = prompt_key(prompt_row.prompt)
        if key in seen:
            if not source.drop_duplicates:
                raise PromptSetError(
                    f"{source.location}: row {number} repeats the prompt of row {seen[key]}",
                    "take the repetition out, or keep the first of each with --drop-duplicates "
                    "(in a policy: drop_duplicates = true)",
                )
            dropped += 1
            continue
        seen[key] = number
        rows.append(prompt_row)
        if source.limit is not None and len(rows) >= source.limit:
            break
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


def _prompt_row(row: Row, number: int, source: PromptSource) -> PromptRow:
    columns = source.prompt_columns or _known_column(row, number, source.location)
    parts = [text_of(row, column, number, source.location) for column in columns]
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise PromptSetError(
            f"{source.location}: row {number} has an empty prompt", "take the row out or fill its prompt"
        )
    answer = None
    if source.answer_column is not None:
        answer = text_of(row, source.answer_column, number, source.location)
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
