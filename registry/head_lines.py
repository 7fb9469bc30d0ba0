"""What a line of the head file is, and how lines are held against the ledger. Nothing here reads or writes a file.

A line is an object in canonical JSON (RFC 8785) and a line feed:

    {"after":12,"at":"2026-01-02T03:04:05.000006Z","count":14,"hash":"…"}

`count` events there were, `hash` is the last one's and `at` its time; `after` is the count of the line before, 0 in the
first. Counts increase. A signed line has `key` and `signature` besides (`registry.signatures`).
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from registry.chain import EventFields, Violation, check_chain

_LINE = re.compile(
    r'\{"after":(0|[1-9][0-9]{0,14}),'
    r'"at":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)",'
    r'"count":([1-9][0-9]{0,14}),'
    r'"hash":"([0-9a-f]{64})"'
    r'(?:,"key":"([0-9a-f]{64})","signature":"([0-9a-f]{128})")?\}'
)
"""A canonical line has exactly one form, so that there is no byte of it that could be changed unseen."""

_OLD_LINE = re.compile(rb'\{"at":"[^"]*","count":\d+,"hash":"[0-9a-f]{64}"\}')


@dataclass(frozen=True, slots=True)
class Head:
    """The ledger's length, last hash and last time at one moment.

    Attributes:
        after: the length that the line before speaks of.
        key, signature: of a signed line, in hexadecimal: the public key and what its owner signed with it.
    """

    count: int
    hash: str
    at: str
    after: int = 0
    key: str | None = None
    signature: str | None = None

    def fields(self) -> dict[str, str | int]:
        """The object that the line is, in the order of its keys."""
        content: dict[str, str | int] = {"after": self.after, "at": self.at, "count": self.count, "hash": self.hash}
        signed = {"key": self.key, "signature": self.signature}
        return content | {name: value for name, value in signed.items() if value is not None}

    def line(self) -> str:
        """The line without its end."""
        return json.dumps(self.fields(), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class MalformedHead:
    """A line of the head file that is not a head: its text, and what is wrong with it."""

    text: str
    problem: str


Line = Head | MalformedHead


def parse_lines(content: bytes) -> tuple[Line, ...]:
    """All lines of a head file, in order; line n is at n − 1."""
    if not content:
        return ()
    *whole, rest = content.split(b"\n")
    lines: list[Line] = [parse_line(line) for line in whole]
    if rest:
        lines.append(MalformedHead(_shown(rest), "is not finished"))
    return tuple(lines)


def parse_line(line: bytes) -> Line:
    """One line, without its end."""
    found = _LINE.fullmatch(line.decode("latin-1"))  # any byte is one character, and those of a head are ASCII
    if found is None:
        old = _OLD_LINE.fullmatch(line) is not None
        return MalformedHead(_shown(line), "is a head of an earlier version" if old else "is not a head")
    after, at, count, digest, key, signature = found.groups()
    return Head(int(count), digest, at, int(after), key, signature)


def check_ledger(lines: Sequence[Line], events: Iterable[EventFields], *, whole: bool = True) -> Iterator[Violation]:
    """`check_chain` and `check_heads` in one pass over the events."""
    observed = _Observed(lines)
    yield from check_chain(observed.passing(events))
    yield from _check(lines, observed, whole=whole)


def check_heads(lines: Sequence[Line], events: Iterable[EventFields], *, whole: bool = True) -> Iterator[Violation]:
    """Every disagreement among the lines of a head file, and between them and the ledger.

    Named are lines that are not heads, that stand in another order, that were repeated, taken out or put in; a ledger
    that was cut off (a head counts more events than there are) or chained anew (the event at a head's count has another
    hash); a head with another time; and a ledger that goes on after the last head.

    Args:
        lines: of the file, in its order.
        events: of the ledger, in its order, as they were when the lines were read; read once.
        whole: the lines are all that was ever written. A copy that somebody kept may lack lines, begin later and end
            earlier; what it says has to hold all the same.
    """
    observed = _Observed(lines)
    for _ in observed.passing(events):
        pass
    yield from _check(lines, observed, whole=whole)


class _Seen(NamedTuple):
    hash: str
    at: str


class _Observed:
    """What the heads speak of, picked out of the events as they pass by."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._wanted = {line.count for line in lines if isinstance(line, Head)}
        self.seen: dict[int, _Seen] = {}
        self.count = 0

    def passing(self, events: Iterable[EventFields]) -> Iterator[EventFields]:
        for event in events:
            self.count = max(self.count, event.sequence)
            if event.sequence in self._wanted:
                self.seen[event.sequence] = _Seen(event.hash, event.created_at)
            yield event


def _check(lines: Sequence[Line], observed: _Observed, *, whole: bool) -> Iterator[Violation]:
    yield from _malformed(lines)
    yield from _out_of_line(lines, whole=whole)
    yield from _disagreeing(lines, observed)
    last = max((line.count for line in lines if isinstance(line, Head)), default=0)
    if whole and last < observed.count:
        yield _open_end(lines, last, observed.count)


def _malformed(lines: Sequence[Line]) -> Iterator[Violation]:
    """One violation for each run of lines with the same fault."""
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if isinstance(line, MalformedHead)]
    for _, run in groupby(enumerate(numbered), lambda item: (item[1][0] - item[0], item[1][1].problem)):
        entries = [entry for _, entry in run]
        (first, line), last = entries[0], entries[-1][0]
        which = f"line {first}" if first == last else f"each of the lines {first} to {last}"
        yield Violation(None, f"{which} of the ledger head file {line.problem}: {line.text!r}{_MENDS[line.problem]}")


_MENDS = {
    "is not a head": "",
    "is not finished": "; if a process died while it wrote, `neuronledger recover` mends it",
    "is a head of an earlier version": "; keep the file elsewhere, and `neuronledger recover` begins a new one",
}


def _out_of_line(lines: Sequence[Line], *, whole: bool) -> Iterator[Violation]:
    """Lines that do not continue the line before."""
    before: int | None = 0  # None: a line that cannot be read, about which enough is said
    highest = 0
    for number, line in enumerate(lines, start=1):
        if isinstance(line, MalformedHead):
            before = None
            continue
        here = f"line {number} of the ledger head file, the head of event {line.count},"
        if line.count <= line.after:
            yield Violation(line.count, f"{here} says that it comes after event {line.after}")
        elif line.count <= highest:
            yield Violation(line.count, f"{here} is repeated or out of order: a line before it is of event {highest}")
        elif before is not None and (line.after < before or (whole and line.after > before)):
            yield Violation(line.count, f"{here} {_misplaced(line.after, before)}")
        before = line.count
        highest = max(highest, line.count)


def _misplaced(after: int, before: int) -> str:
    if after > before:
        return f"comes after the head of event {after}, and that line is missing"
    follows = f"comes after the head of event {after}" if after else "is the first"
    return f"says that it {follows}, but the line before it is of event {before}: a line was put in"


def _disagreeing(lines: Sequence[Line], observed: _Observed) -> Iterator[Violation]:
    """Heads that the events contradict."""
    longest = 0
    for head in lines:
        if isinstance(head, MalformedHead):
            continue
        seen = observed.seen.get(head.count)
        if head.count > observed.count:
            longest = max(longest, head.count)
        elif seen is None:
            yield Violation(head.count, f"event {head.count}, of which a head was kept at {head.at}, is missing")
        elif seen.hash != head.hash:
            yield Violation(
                head.count,
                f"event {head.count} has another hash than the head that was kept of it at {head.at}: "
                "the chain was computed anew",
            )
        elif seen.at != head.at:
            yield Violation(head.count, f"the head that was kept of event {head.count} gives another time: {head.at!r}")
    if longest:
        yield Violation(
            observed.count + 1,
            f"the ledger ends after event {observed.count}, but a head of {longest} events was kept: "
            "its end is cut off",
        )


def _open_end(lines: Sequence[Line], last: int, count: int) -> Violation:
    where = f"the last head is of event {last}" if last else "the exported heads are missing"
    lost = "lines were removed" if last else "the file was removed" if not lines else "no line of it can be read"
    return Violation(
        last + 1,
        f"the ledger has {count} events, but {where}: {lost}, or a process died between commit and head; "
        "`neuronledger recover` completes it",
    )


def _shown(line: bytes) -> str:
    return line[:60].decode("utf-8", "replace")
