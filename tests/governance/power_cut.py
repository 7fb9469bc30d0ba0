"""What a power cut takes: everything that was written, made, renamed or removed since the last flush of it.

A killed process leaves its writes in the system's cache, so a missing `fsync` never shows. Here every change is
remembered until its file, or the directory that names it, is flushed; `lose` takes back what is left, newest first.
That is the worst that a file system may do, not what one commonly does.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Identity = tuple[int, int]


@dataclass(frozen=True)
class _Change:
    """How a change is taken back; it lasts once the file or directory `held_by` is flushed."""

    held_by: Identity
    undo: Callable[[], None]


@dataclass
class Unflushed:
    """The changes that no flush has made lasting yet, oldest first."""

    changes: list[_Change] = field(default_factory=list)

    def overwriting(self, descriptor: int, offset: int, length: int) -> None:
        """Remember the bytes that a write or truncation of an open file is about to replace."""
        file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # whatever name the file has by then
        before, size = os.pread(file, length, offset), os.fstat(file).st_size

        def undo() -> None:
            os.pwrite(file, before, offset)
            os.ftruncate(file, size)

        self.changes.append(_Change(_identity(os.fstat(file)), undo))

    def naming(self, path: Path, source: Path | None = None) -> None:
        """Remember what a directory says of a name before it is made, removed, or takes over that of `source`."""
        before = path.read_bytes() if path.is_file() else None
        status = path.stat() if before is not None else None

        def undo() -> None:
            if source is not None:
                path.rename(source)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if before is not None and status is not None:
                path.write_bytes(before)
                path.chmod(status.st_mode)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        self.changes.append(_Change(_identity(path.parent.stat()), undo))

    def flushed(self, descriptor: int) -> None:
        """What the flushed file or directory holds will last."""
        identity = _identity(os.fstat(descriptor))
        self.changes = [change for change in self.changes if change.held_by != identity]

    def lose(self) -> None:
        """Take back everything that was not flushed."""
        for change in reversed(self.changes):
            change.undo()


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
