"""Writing files so that they survive a power cut: every byte, flushed, and the directory that names them."""

import os
from pathlib import Path
from threading import Lock

_UMASK_LOCK = Lock()


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content` where the descriptor stands, however often the system writes only part of it."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of `content` at a byte offset, however often the system writes only part of it."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest = rest[written:]
        offset += written


def create_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a new file and flush it.

    Raises:
        OSError: it is there already, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, temporary: Path) -> None:
    """Put `content` in a file's place in one step, keeping its mode: temporary file, flush, rename, flush.

    Args:
        path: the file, which need not exist yet.
        content: all of its new content.
        temporary: a path beside it that nobody else uses; what lies there is removed.

    Raises:
        OSError: something cannot be written; the file that was there is still there.
    """
    temporary.unlink(missing_ok=True)
    create_file(temporary, content)
    if path.exists():
        temporary.chmod(path.stat().st_mode)
    temporary.replace(path)
    sync_directory(path.parent)


def masked(mode: int) -> int:
    """A mode without what the process's umask takes away."""
    with _UMASK_LOCK:  # it can only be read by setting it; what others make meanwhile is too private, not too open
        mask = os.umask(0o077)
        os.umask(mask)
    return mode & ~mask


def make_directory(directory: Path) -> None:
    """Make a directory with its parents, where they are not there yet, and flush the names of those that it made.

    Raises:
        OSError: one cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory, so that a file created or renamed in it survives a power cut."""
    if os.name == "nt":  # Windows cannot open directories, and renames there are synchronous enough
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
