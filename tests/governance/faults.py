"""Faults of disk, database and process, at the n-th point where an action changes something on disk.

`struck_by` puts one layer under every function of `os` that changes a file, under files opened for writing, and under
the COMMIT of SQLAlchemy. The layer counts what happens below a directory and, at the n-th point, lets it fail, stores
half of a write, or ends the process by SIGKILL. `killed` runs an action in a child process for the latter.
"""

import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import pytest
import torch
from sqlalchemy.engine.default import DefaultDialect

from tests.governance.power_cut import Unflushed
from tests.processes import fork

Kind = Literal[
    "write", "fsync", "rename", "link", "unlink", "truncate", "mkdir", "create", "mode", "commit", "committed"
]
TAKES_SPACE: frozenset[Kind] = frozenset({"write", "link", "truncate", "mkdir", "create", "commit"})
Effect = OSError | KeyboardInterrupt | Literal["kill", "power cut", "short write"] | Callable[[], object]

# What SQLite and PostgreSQL say where the system says this: message, SQLite's name, PostgreSQL's class of psycopg.
_DATABASE_ERRORS = {
    errno.ENOSPC: ("database or disk is full", "SQLITE_FULL", "DiskFull"),
    errno.EIO: ("disk I/O error", "SQLITE_IOERR", "IoError"),
}


@dataclass
class Fault:
    """What goes wrong, and when.

    Attributes:
        directory: only what happens below it counts; a COMMIT always does.
        kind: only such points count; all of them if left out. `commit` is just before a COMMIT, `committed` just after.
        at: the number of the point (from 1) at which it strikes; 0 only counts.
        effect: the error raised there, after half of a write is stored; or the end of the process there, with all that
            was written so far (`kill`) or without what was not flushed (`power cut`); or a write that stores half and
            says so (`short write`). A function is called instead, and nothing fails.
        once: whether all that comes after the point works again; if not, whatever takes space goes on failing.
        points: what has been counted, as "KIND FILE".
    """

    directory: Path
    kind: Kind | None = None
    at: int = 0
    effect: Effect | None = None
    once: bool = True
    points: list[str] = field(default_factory=list, init=False)
    unflushed: Unflushed = field(default_factory=Unflushed, init=False)
    lock: AbstractContextManager[object] = field(default_factory=RLock, init=False, repr=False)

    @property
    def count(self) -> int:
        """How many points there have been."""
        return len(self.points)

    @property
    def struck(self) -> bool:
        """Whether the point has been reached."""
        return 0 < self.at <= self.count

    def meet(self, kind: Kind, path: Path, tear: Callable[[], int] | None = None, dialect: Any = None) -> int | None:
        """Count a point and let the fault happen if it is the one.

        Args:
            kind: of the point.
            path: what is changed.
            tear: stores half of a write and returns how many bytes.
            dialect: of the database, at a COMMIT.

        Returns:
            the bytes that a short write stored; None where the operation is to go on.
        """
        if (self.kind is not None and kind != self.kind) or not path.is_relative_to(self.directory):
            return None
        with self.lock:  # several threads may come to points at once
            self.points.append(f"{kind} {path.relative_to(self.directory)}")
            number = self.count
        goes_on = not self.once and self.struck and (kind in TAKES_SPACE or kind == self.kind)
        if self.effect is None or not (number == self.at or goes_on):
            return None
        if callable(self.effect):
            self.effect()
            return None
        stored = tear() if tear is not None and number == self.at else None
        if self.effect == "short write":
            return stored
        if self.effect == "power cut":
            with self.lock:  # no other thread goes on while changes are taken back
                self.at = 0  # taking changes back is no point itself
                self.unflushed.lose()
                os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(self.effect, str):
            os.kill(os.getpid(), signal.SIGKILL)
        raise _database_error(self.effect, dialect) if dialect is not None else self.effect  # type: ignore[misc]

    def remember(self, change: Callable[[Unflushed], None]) -> None:
        """Keep what a power cut would take back."""
        with self.lock:
            if self.effect == "power cut" and self.at:
                change(self.unflushed)


@contextmanager
def struck_by(fault: Fault) -> Iterator[Fault]:
    """Let a fault happen to whatever runs inside."""
    with pytest.MonkeyPatch.context() as patch:
        for wrap in (_wrap_writes, _wrap_flushes, _wrap_names, _wrap_opening, _wrap_commit):
            wrap(patch, fault)
        yield fault


def killed(fault: Fault, act: Callable[[], object]) -> bool:
    """Run `act` in a child process under a fault that kills; whether the child came to the point and died there.

    The caller has closed its connections: they are not shared between processes, and the child makes its own.
    """

    def act_under_the_fault() -> None:
        # Torch's pool of threads does not survive a fork, and two threads that find that out at once would fail.
        torch.set_num_threads(1)
        with struck_by(fault):
            act()

    ended = fork(act_under_the_fault).wait()
    assert not ended.failed, ended.told
    assert ended.signal in {None, signal.SIGKILL}
    return ended.signal is not None


def flip_byte(path: Path, offset: int, mask: int = 0x01) -> None:
    """Change one byte and leave the file's size and modification time as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    mode = status.st_mode
    path.chmod(mode | 0o200)
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _wrap_writes(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    write, pwrite = os.write, os.pwrite

    def written(descriptor: int, path: Path, offset: int, content: Any, store: Callable[[Any], int]) -> int:
        view = memoryview(content).cast("B")
        fault.remember(lambda unflushed: unflushed.overwriting(descriptor, offset, len(view)))
        stored = fault.meet("write", path, tear=lambda: store(view[: max(1, len(view) // 2)]))
        return store(view) if stored is None else stored

    def wrapped_write(descriptor: int, content: Any) -> int:
        path = _path_of(descriptor)
        if not path.is_relative_to(fault.directory):
            return write(descriptor, content)
        flags = os.O_APPEND & _flags_of(descriptor)
        offset = os.lseek(descriptor, 0, os.SEEK_END if flags else os.SEEK_CUR)
        return written(descriptor, path, offset, content, lambda part: write(descriptor, part))

    def wrapped_pwrite(descriptor: int, content: Any, offset: int) -> int:
        path = _path_of(descriptor)
        if not path.is_relative_to(fault.directory):
            return pwrite(descriptor, content, offset)
        return written(descriptor, path, offset, content, lambda part: pwrite(descriptor, part, offset))

    patch.setattr(os, "write", wrapped_write)
    patch.setattr(os, "pwrite", wrapped_pwrite)
    for name in ("writev", "pwritev", "sendfile"):
        patch.setattr(os, name, _without_halves(getattr(os, name), fault))


def _without_halves(original: Callable[..., int], fault: Fault) -> Callable[..., int]:
    """A write whose content is not at hand: it fails before anything is stored."""

    def wrapped(descriptor: int, *arguments: Any) -> int:
        path = _path_of(descriptor)
        if path.is_relative_to(fault.directory):
            size = os.fstat(descriptor).st_size
            fault.remember(lambda unflushed: unflushed.overwriting(descriptor, 0, size))
        fault.meet("write", path)
        return original(descriptor, *arguments)

    return wrapped


def _wrap_flushes(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    for name in ("fsync", "fdatasync"):
        original = getattr(os, name)

        def wrapped(target: Any, original: Callable[[Any], None] = original) -> None:
            descriptor = target if isinstance(target, int) else target.fileno()
            fault.meet("fsync", _path_of(descriptor))
            original(descriptor)
            fault.remember(lambda unflushed: unflushed.flushed(descriptor))

        patch.setattr(os, name, wrapped)


def _wrap_names(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Everything that takes paths. What would not change anything (a file to remove that is not there) is no point."""

    def wrap(name: str, kind: Kind, *, target: int = 0, needs: bool | None) -> None:
        original = getattr(os, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            path = _absolute(arguments[target], options.get("dir_fd"))
            if needs is None or os.path.lexists(path) == needs:
                fault.meet(kind, path)
                if kind in {"rename", "link", "unlink", "mkdir"} and path.is_relative_to(fault.directory):
                    source = _absolute(arguments[0]) if kind == "rename" else None
                    fault.remember(lambda unflushed: unflushed.naming(path, source))
            return original(*arguments, **options)

        patch.setattr(os, name, wrapped)

    for name in ("rename", "replace"):
        wrap(name, "rename", target=1, needs=None)
    for name in ("link", "symlink"):
        wrap(name, "link", target=1, needs=False)
    for name in ("unlink", "remove", "rmdir"):
        wrap(name, "unlink", needs=True)
    for name in ("chmod", "utime"):
        wrap(name, "mode", needs=True)
    wrap("mkdir", "mkdir", needs=False)
    wrap("truncate", "truncate", needs=True)
    truncate = os.ftruncate

    def wrapped_truncate(descriptor: int, length: int) -> None:
        path = _path_of(descriptor)
        fault.meet("truncate", path)
        if path.is_relative_to(fault.directory):
            size = os.fstat(descriptor).st_size
            fault.remember(lambda unflushed: unflushed.overwriting(descriptor, length, max(0, size - length)))
        truncate(descriptor, length)

    patch.setattr(os, "ftruncate", wrapped_truncate)


def _wrap_opening(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    open_descriptor, open_file = os.open, io.open

    def creating(path: Path) -> None:
        if not os.path.lexists(path):
            fault.meet("create", path)
            if path.is_relative_to(fault.directory):
                fault.remember(lambda unflushed: unflushed.naming(path))

    def wrapped_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            creating(_absolute(path, options.get("dir_fd")))
        return open_descriptor(path, flags, *arguments, **options)

    def wrapped_file(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        path = None if isinstance(file, int) else _absolute(file)
        if path is None or not set(mode) & set("wax+") or not path.is_relative_to(fault.directory):
            return open_file(file, mode, buffering, *arguments, **options)
        creating(path)
        if "w" in mode and path.exists():
            fault.meet("truncate", path)
        raw = _FileByDescriptor(path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **options)

    patch.setattr(os, "open", wrapped_descriptor)
    patch.setattr(io, "open", wrapped_file)
    patch.setattr("builtins.open", wrapped_file)


def _wrap_commit(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    commit = DefaultDialect.do_commit

    def wrapped(dialect: Any, connection: Any) -> None:
        place = fault.directory / dialect.name
        fault.meet("commit", place, dialect=dialect)
        commit(dialect, connection)
        fault.meet("committed", place, dialect=dialect)

    patch.setattr(DefaultDialect, "do_commit", wrapped)


class _FileByDescriptor(io.FileIO):
    """A file of `open` whose writes go through `os`, where the layer sees them."""

    def write(self, content: Any) -> int:
        return os.write(self.fileno(), content)

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        os.ftruncate(self.fileno(), length)
        return length


def _database_error(error: OSError | KeyboardInterrupt, dialect: Any) -> BaseException:
    """What the database's driver raises for an error of the system."""
    if not isinstance(error, OSError):
        return error
    message, name, state = _DATABASE_ERRORS[error.errno or errno.EIO]
    driver = dialect.loaded_dbapi
    if dialect.name == "postgresql":
        raised: BaseException = getattr(driver.errors, state)(message)
        return raised
    raised = driver.OperationalError(message)
    raised.sqlite_errorname = name  # type: ignore[attr-defined]
    return raised


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _flags_of(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def _absolute(path: Any, directory: int | None = None) -> Path:
    if isinstance(path, int):
        return _path_of(path)
    start = Path.cwd() if directory is None else _path_of(directory)
    return start / os.fsdecode(path)
