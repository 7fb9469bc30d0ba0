"""The ledger's heads, kept in a file outside the database.

Every commit that added events appends one line (`registry.head_lines`). A ledger whose end was cut off, or whose chain
was computed anew, is consistent in itself but no longer agrees with these lines; and since each line says which one it
comes after, the lines hold each other in place. Copying the file to where the database's owner cannot write makes it
evidence against the owner too.

A writer holds the file's lock from before its commit until its line is flushed. So lines stand in the order of the
commits, and whoever reads them under the shared lock sees no commit without its line, unless a process died in between.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from registry.errors import RegistryError
from registry.file_locks import file_lock
from registry.files import sync_directory, write_all
from registry.head_lines import Head, Line, parse_line, parse_lines

Sign = Callable[[Head], Head]
"""Makes a signed line of a head whose `after` is settled."""

_CHUNK = 4096


@dataclass(frozen=True)
class HeadFile:
    """A file of heads, one JSON object per line, oldest first."""

    path: Path

    @contextmanager
    def held(self) -> Iterator["HeldHeads"]:
        """The file, made if there is none, with its lock: nobody else writes it meanwhile.

        Raises:
            RegistryError: the file cannot be written or locked.
            RegistryBusyError: somebody else held it for longer than ten seconds.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            created = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable("written", error) from error
        try:
            with self._lock(descriptor):
                yield HeldHeads(self.path, descriptor, created)
        finally:
            os.close(descriptor)

    @contextmanager
    def shared(self) -> Iterator[bytes | None]:
        """The file's content, or None if there is no file. While this lasts no commit can come that has a head.

        Raises:
            RegistryError: the file is there but cannot be read or locked.
            RegistryBusyError: a writer held it for longer than ten seconds.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise self._unusable("read", error) from error
        try:
            with self._lock(descriptor, shared=True):
                try:
                    content = b"".join(iter(lambda: os.read(descriptor, 1 << 20), b""))
                except OSError as error:
                    raise self._unusable("read", error) from error
                yield content
        finally:
            os.close(descriptor)

    def read(self) -> tuple[Line, ...]:
        """All lines; none if there is no file yet.

        Raises:
            RegistryError: the file is there but cannot be read or locked.
            RegistryBusyError: a writer held it for longer than ten seconds.
        """
        with self.shared() as content:
            return parse_lines(content or b"")

    @contextmanager
    def _lock(self, descriptor: int, *, shared: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(descriptor, f"the ledger head file {self.path}", shared=shared))
            except OSError as error:
                raise self._unusable("locked", error) from error
            yield

    def _unusable(self, how: str, error: OSError) -> RegistryError:
        mends = {
            "written": "Make the file writable",
            "read": "Give yourself read permission",
            "locked": "Keep the registry's directory on a file system that has locks",
        }
        return RegistryError(f"the ledger head file {self.path} cannot be {how}: {error.strerror}", mends[how])


@dataclass(frozen=True)
class HeldHeads:
    """The head file in the hands of the one who may append to it. Made by `HeadFile.held`."""

    path: Path
    descriptor: int
    created: bool

    def append(self, head: Head, sign: Sign | None = None) -> bool:
        """Write one line and flush it to the disk; what a full disk or a power cut left of a line gives way to it.

        Args:
            head: its `after` is filled in.
            sign: makes a signed line of it.

        Returns:
            whether anything was missing. The head of a shorter ledger than the last line's is covered by that line.

        Raises:
            RegistryError: the file cannot be written.
        """
        try:
            torn = self._mend_end()
            last = next(self._heads_backwards(), None)
            after = last.count if last is not None else 0
            if head.count > after:
                line = replace(head, after=after)
                line = sign(line) if sign is not None else line
                write_all(self.descriptor, (b"\n" if torn else b"") + line.line().encode() + b"\n")
            elif torn:
                write_all(self.descriptor, b"\n")
            else:
                return False
            os.fsync(self.descriptor)
            if self.created:
                sync_directory(self.path.parent)
        except OSError as error:
            raise RegistryError(
                f"the change is recorded in the registry, but the ledger head file {self.path} cannot be written: "
                f"{error.strerror}",
                "Make the file writable; the next change appends the newest head, or `neuronledger recover` does",
            ) from error
        return True

    def _mend_end(self) -> bool:
        """Cut off what is left of a line, and tell whether a whole one only lacks its end."""
        last = next(self._lines_backwards())
        if not last:
            return False
        if isinstance(parse_line(last), Head):
            return True
        os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - len(last))
        return False

    def _heads_backwards(self) -> Iterator[Head]:
        """The heads, newest first; lines that are none stay where they are, for a check to name."""
        for line in self._lines_backwards():
            if isinstance(head := parse_line(line), Head):
                yield head

    def _lines_backwards(self) -> Iterator[bytes]:
        """What follows the last line's end, mostly nothing; then the lines, newest first."""
        end = os.fstat(self.descriptor).st_size
        rest = b""
        while end:
            begin = max(0, end - _CHUNK)
            first, *whole = (os.pread(self.descriptor, end - begin, begin) + rest).split(b"\n")
            yield from reversed(whole)
            end, rest = begin, first
        yield rest
