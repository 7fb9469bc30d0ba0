"""Faults of disk and process: the n-th write, flush or rename below a directory fails, tears, or ends the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Operation = Literal["pwrite", "fsync", "replace"]
OPERATIONS: tuple[Operation, ...] = ("pwrite", "fsync", "replace")


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        directory: only operations on files below it count.
        operation: which kind of operation.
        at: the number of the operation (from 1) from which on it fails.
        error: raised instead; None only counts.
        once: whether the operations after it work again.
        torn: a write stores half of its bytes before it fails.
    """

    directory: Path
    operation: Operation
    at: int = 0
    error: BaseException | None = None
    once: bool = True
    torn: bool = False
    count: int = field(default=0, init=False)

    def strike(self, path: Path) -> bool:
        """Count an operation and tell whether it is the one that fails."""
        if not path.is_relative_to(self.directory):
            return False
        self.count += 1
        return self.error is not None and (self.count == self.at if self.once else self.count >= self.at)


@contextmanager
def struck_by(fault: Fault) -> Iterator[Fault]:
    """Let a fault happen to whatever runs inside."""
    pwrite, fsync, replace = os.pwrite, os.fsync, Path.replace

    def failing_pwrite(descriptor: int, content: Any, offset: int) -> int:
        if fault.strike(_path_of(descriptor)):
            if fault.torn:
                pwrite(descriptor, memoryview(content)[: len(content) // 2], offset)
            raise fault.error  # type: ignore[misc]
        return pwrite(descriptor, content, offset)

    def failing_fsync(descriptor: int) -> None:
        if fault.strike(_path_of(descriptor)):
            raise fault.error  # type: ignore[misc]
        fsync(descriptor)

    def failing_replace(path: Path, target: Path) -> Path:
        if fault.strike(Path(target)):
            raise fault.error  # type: ignore[misc]
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        if fault.operation == "pwrite":
            patch.setattr(os, "pwrite", failing_pwrite)
        elif fault.operation == "fsync":
            patch.setattr(os, "fsync", failing_fsync)
        else:
            patch.setattr(Path, "replace", failing_replace)
        yield fault


def flip_byte(path: Path, offset: int) -> None:
    """Change one byte and leave the file's size and modification time as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x01
    mode = status.st_mode
    path.chmod(mode | 0o200)
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
