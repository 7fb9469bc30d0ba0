"""The ledger's heads, kept in a file outside the database.

After every commit that added events, one JSON line `{"at": …, "count": n, "hash": h}` is appended. A ledger whose end
was cut off, or whose chain was computed anew, is consistent in itself but no longer agrees with these lines. Copying
the file to where the database's owner cannot write makes it evidence against the owner too.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.errors import RegistryError
from registry.files import sync_directory, write_all
from registry.ledger import EventFields, Violation, check_chain

_LONGEST_LINE = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """The ledger's length and last hash at one moment."""

    count: int
    hash: str
    at: str


@dataclass(frozen=True, slots=True)
class MalformedHead:
    """A line of the head file that is not a head."""

    line: int
    text: str


@dataclass(frozen=True)
class HeadFile:
    """A file of heads, one JSON object per line, oldest first."""

    path: Path

    def append(self, head: Head) -> None:
        """Write one line and flush it to the disk.

        Raises:
            RegistryError: the file cannot be written.
        """
        line = json.dumps(
            {"at": head.at, "count": head.count, "hash": head.hash}, separators=(",", ":"), sort_keys=True
        )
        try:
            created = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                torn = self._mend_end(descriptor)
                write_all(descriptor, (("\n" if torn else "") + line + "\n").encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if created:
                sync_directory(self.path.parent)
        except OSError as error:
            raise RegistryError(
                f"the change is recorded in the registry, but the ledger head file {self.path} cannot be written: "
                f"{error.strerror}",
                "Make the file writable; the next change appends the newest head",
            ) from error

    @staticmethod
    def _mend_end(descriptor: int) -> bool:
        """Cut off what a full disk or a power cut left of a line, and tell whether a whole one only lacks its end."""
        end = os.fstat(descriptor).st_size
        begin = max(0, end - _LONGEST_LINE)
        last = os.pread(descriptor, end - begin, begin).rpartition(b"\n")[2]
        if not last:
            return False
        if isinstance(_parse(0, last.decode("utf-8", "replace")), Head):
            return True
        os.ftruncate(descriptor, end - len(last))
        return False

    def require_writable(self) -> None:
        """Check, before a change is committed, that its head can be appended after it.

        Raises:
            RegistryError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644))
        except OSError as error:
            raise RegistryError(
                f"the ledger head file {self.path} cannot be written: {error.strerror}", "Make the file writable"
            ) from error

    def read(self) -> tuple[Head | MalformedHead, ...]:
        """All heads; none if there is no file yet.

        Raises:
            RegistryError: the file is there but cannot be read.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise RegistryError(
                f"the ledger head file {self.path} cannot be read: {error.strerror}", "Give yourself read permission"
            ) from error
        return tuple(_parse(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def check_heads(heads: Sequence[Head | MalformedHead], events: Iterable[EventFields]) -> Iterator[Violation]:
    """Every disagreement between the heads and the ledger.

    Names a ledger that was cut off (a head counts more events than there are), one that was chained anew (the event at
    a head's count has another hash), heads that give another time, and lines of the file that are not heads.
    """
    wanted = {head.count for head in heads if isinstance(head, Head)}
    found: dict[int, Head] = {}
    count = 0
    for event in events:
        count = max(count, event.sequence)
        if event.sequence in wanted:
            found[event.sequence] = Head(event.sequence, event.hash, event.created_at)
    yield from _compare(heads, found, count)


def check_ledger(heads: Sequence[Head | MalformedHead], events: Iterable[EventFields]) -> Iterator[Violation]:
    """`check_chain` and `check_heads` in one pass over the events."""
    wanted = {head.count for head in heads if isinstance(head, Head)}
    found: dict[int, Head] = {}
    count = 0

    def observed() -> Iterator[EventFields]:
        nonlocal count
        for event in events:
            count = max(count, event.sequence)
            if event.sequence in wanted:
                found[event.sequence] = Head(event.sequence, event.hash, event.created_at)
            yield event

    yield from check_chain(observed())
    yield from _compare(heads, found, count)


def _compare(heads: Sequence[Head | MalformedHead], found: dict[int, Head], count: int) -> Iterator[Violation]:
    longest = 0
    for head in heads:
        if isinstance(head, MalformedHead):
            yield Violation(None, f"line {head.line} of the ledger head file is not a head: {head.text[:60]!r}")
        elif head.count > count:
            longest = max(longest, head.count)
        elif head.count not in found:
            yield Violation(head.count, f"event {head.count}, of which a head was kept at {head.at}, is missing")
        elif found[head.count].hash != head.hash:
            yield Violation(
                head.count,
                f"event {head.count} has another hash than the head that was kept of it at {head.at}: "
                "the chain was computed anew",
            )
        elif found[head.count].at != head.at:
            yield Violation(head.count, f"the head that was kept of event {head.count} gives another time: {head.at!r}")
    if longest:
        yield Violation(
            count + 1,
            f"the ledger ends after event {count}, but a head of {longest} events was kept: its end is cut off",
        )


def _parse(number: int, line: str) -> Head | MalformedHead:
    try:
        fields = json.loads(line)
        count, digest, at = fields["count"], fields["hash"], fields["at"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return MalformedHead(number, line)
    if type(count) is not int or count < 1 or not isinstance(digest, str) or not isinstance(at, str):
        return MalformedHead(number, line)
    return Head(count, digest, at)
