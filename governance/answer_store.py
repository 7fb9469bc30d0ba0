"""Answers of models and verdicts of judges, kept so that nothing is generated or judged twice.

They lie in the directory `answers` beside the registry, readable by their owner only: one file of lines for each state
of a model, weights and configuration, and one for each judge. A line is appended and flushed as soon as a batch is
done, so an evaluation that was killed goes on where it stopped; a line that was cut off is passed over. The files are a
cache: no record needs them, and they may be removed at any time. Prompts do not stand in them, answers do.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rfc8785

from algorithms.judges import Judge, Verdict
from governance.placement import Precision
from governance.workspace import Workspace
from registry.files import write_all

DIRECTORY = "answers"
_NAME = re.compile(r"[0-9A-Za-z._-]{1,128}")


class KeyedLines:
    """Values by key in an append-only file, one JSON object a line. Of two values for a key the later counts."""

    def __init__(self, path: Path) -> None:
        """Name the file, which need not be there."""
        self._path = path
        self._values: dict[str, Any] | None = None

    def get(self, key: str) -> Any | None:
        """The value of a key, or None."""
        return self._read().get(key)

    def add(self, values: Mapping[str, Any]) -> None:
        """Append values in one write, so that what several processes append stays whole.

        Raises:
            OSError: the file cannot be written.
        """
        lines = (json.dumps({"key": key, "value": value}, ensure_ascii=True) + "\n" for key, value in values.items())
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            write_all(descriptor, ("\n" * torn + "".join(lines)).encode("ascii"))
        finally:
            os.close(descriptor)
        self._read().update(values)

    def _read(self) -> dict[str, Any]:
        if self._values is None:
            self._values = {}
            content = self._path.read_bytes() if self._path.exists() else b""
            for line in content.splitlines():
                try:
                    held = json.loads(line)
                except ValueError:  # cut off by a kill, or not ours
                    continue
                if isinstance(held, dict) and isinstance(held.get("key"), str) and "value" in held:
                    self._values[held["key"]] = held["value"]
        return self._values


def answers_of(workspace: Workspace, state: str) -> KeyedLines:
    """The stored answers of one state of a model.

    Raises:
        ValueError: `state` cannot stand in a file's name.
    """
    if not _NAME.fullmatch(state):
        raise ValueError(f"{state!r} is no digest of a state")
    return KeyedLines(workspace.directory / DIRECTORY / f"{state}.jsonl")


def answer_key(encoded: Sequence[int], max_new_tokens: int, dtype: Precision = "float32") -> str:
    """What an answer turns on beside the weights: the tokens that the model reads, how it decodes, and in what format.

    Devices round differently too, but where a model lay is no part of it.
    """
    content: dict[str, Any] = {"input_ids": list(encoded), "decoding": "greedy", "max_new_tokens": max_new_tokens}
    content |= {} if dtype == "float32" else {"dtype": dtype}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()


def verdicts_of(workspace: Workspace, judge: Judge) -> KeyedLines:
    """The stored verdicts of one judge."""
    return KeyedLines(workspace.directory / DIRECTORY / f"verdicts-{judge.digest}.jsonl")


def verdict_key(prompt: str, answer: str) -> str:
    """What a verdict turns on beside the judge."""
    return hashlib.sha256(json.dumps([prompt, answer]).encode("ascii")).hexdigest()


def verdict_value(verdict: Verdict) -> list[Any]:
    """A verdict as it is stored."""
    return [verdict.unsafe, verdict.score]


def verdict_of(value: Any) -> Verdict | None:
    """A stored verdict; None where it is none."""
    match value:
        case [bool(unsafe), None | float() | int() as score]:
            return Verdict(unsafe, None if score is None else float(score))
    return None
