"""The working checkpoint of a lineage: a copy of the subject's directory whose weight files patches rewrite.

No file that a patch can rewrite is shared with any other path: it is a reflink where the file system offers one, and
else a copy. Weight files without a single row that a patch can reach are hard links where the disk is the same; a
symbolic link, such as those of a Hugging Face cache, is followed and replaced by a copy of what it points to. The copy
is made under another name and renamed when it is whole, so a kill leaves nothing that looks like a working checkpoint.
That name tells the process that makes it, so that what a kill left can be removed.
"""

import errno
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from algorithms.buffers import BUFFER_BYTES, borrowed
from algorithms.parallel import trailing
from governance.errors import SpaceError
from registry.files import make_directory, sync_directory, write_all
from registry.processes import Owner, this_process

_MAKING = ".making"
_MARGIN = 16 * 2**20
_COPIED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
"""Weights in other formats: never opened, and left behind, since a patch would not reach them."""


@contextmanager
def copied_checkpoint(
    source: Path,
    target: Path,
    never_rewritten: Collection[str] = (),
    measure: Callable[[Path, str], object] | None = None,
) -> Iterator[Path]:
    """Copy a model's directory beside the place where it is to be; removed at exit unless it was moved there.

    Args:
        source: directory of the subject.
        target: where `move_into_place` will put it.
        never_rewritten: names of weight files that no patch can reach.
        measure: called with the copy's directory and the name of each copied file in it, in another thread while the
            next one is copied.

    Raises:
        SpaceError: the copy cannot be written, or does not fit on its disk.
    """
    remove_abandoned_copies(target.parent)
    files = copied_files(source)
    linked = {path for path in files if path.parent == source and path.name in never_rewritten}
    require_space(target, sum(path.stat().st_size for path in files if path not in linked))
    making = target.with_name(f".{this_process().name}.{secrets.token_hex(8)}{_MAKING}")
    try:
        with disk_errors(target):
            make_directory(target.parent)

            def copies() -> Iterator[str]:
                for path in files:
                    name = path.relative_to(source).as_posix()
                    copy = making / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    if path not in linked or not _hard_link(path, copy):
                        _copy_file(path, copy)
                    yield name

            measured = copies() if measure is None else trailing(partial(measure, making), copies())
            deque(measured, maxlen=0)
            for directory in (making, *(path for path in sorted(making.rglob("*")) if path.is_dir())):
                sync_directory(directory)
        yield making
    finally:
        discard_working_checkpoint(making)


def remove_abandoned_copies(directory: Path) -> None:
    """Remove the unfinished copies in a directory whose processes are surely gone."""
    for copy in directory.glob(f".*{_MAKING}"):
        owner = Owner.named(copy.name.removeprefix(".").removesuffix(_MAKING).rpartition(".")[0])
        if owner is not None and owner.liveness == "dead":
            shutil.rmtree(copy, ignore_errors=True)


def copied_files(source: Path) -> list[Path]:
    """The files of a model's directory that belong into a working checkpoint, sorted."""
    return [path for path in sorted(source.rglob("*")) if path.is_file() and _belongs(path, source)]


def move_into_place(copy: Path, target: Path) -> None:
    """Give a whole copy its name.

    Raises:
        SpaceError: it cannot be renamed.
    """
    with disk_errors(target):
        copy.replace(target)
        sync_directory(target.parent)


def require_unused(target: Path) -> None:
    """Refuse a directory that holds something already.

    Raises:
        SpaceError: it does.
    """
    if target.exists() and any(target.iterdir()):
        raise SpaceError(
            f"the working checkpoint {target} exists and is not empty", "name an empty directory with --working"
        )


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Name the checkpoint that is being written in whatever the operating system refuses.

    Raises:
        SpaceError: in place of every `OSError` inside.
    """
    try:
        yield
    except OSError as error:
        raise SpaceError(
            f"the checkpoint {target} cannot be written ({error.strerror or error})",
            "free space on that disk, mend its permissions, or name another directory",
        ) from error


def discard_working_checkpoint(target: Path) -> None:
    """Remove a working checkpoint that no lineage came to own."""
    shutil.rmtree(target, ignore_errors=True)


def require_space(target: Path, size: int) -> None:
    """Refuse a write that would not fit.

    Raises:
        SpaceError: naming the disk, what is needed and what is free.
    """
    existing = target
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size + _MARGIN > free:
        raise SpaceError(
            f"{target} needs {size:,} bytes and its disk has {free:,} free", "free space, or use another directory"
        )
    if not os.access(existing, os.W_OK):
        raise SpaceError(f"{existing} cannot be written", "mend its permissions, or use another directory")


def _belongs(path: Path, source: Path) -> bool:
    relative = path.relative_to(source)
    return not any(part.startswith(".") for part in relative.parts) and path.suffix not in _COPIED_ENDINGS


def _hard_link(source: Path, target: Path) -> bool:
    """Share a file that is never rewritten. Not through a symbolic link: a cache may replace what it points to."""
    if source.is_symlink():
        return False
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _copy_file(source: Path, target: Path) -> None:
    mode = stat.S_IMODE(source.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR
    with source.open("rb", buffering=0) as reading:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            if not _reflink(reading.fileno(), writing):
                with borrowed(BUFFER_BYTES) as buffer:
                    while count := reading.readinto(buffer):
                        write_all(writing, buffer[:count])
            os.fchmod(writing, mode)  # what the umask took away
            os.fsync(writing)
        finally:
            os.close(writing)


def _reflink(source: int, target: int) -> bool:
    """Share the blocks copy-on-write where the file system can (Btrfs, XFS); writes to either stay apart."""
    try:
        import fcntl
    except ImportError:
        return False
    clone_file = 0x40049409
    try:
        fcntl.ioctl(target, clone_file, source)
    except OSError as error:
        if error.errno in _NO_REFLINKS:
            return False
        raise
    return True


_NO_REFLINKS = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_NO_LINKS = {errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EACCES}
