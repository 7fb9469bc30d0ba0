"""The working checkpoint of a lineage: a copy of the subject's directory whose weight files patches rewrite.

It shares no file with any other path: everything is copied (a reflink where the file system offers one), and
symlinks such as those of a Hugging Face cache are followed and replaced by what they point to.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

from algorithms.digests import digest_file
from governance.errors import SpaceError
from governance.weight_state import FileState

_MARGIN = 16 * 2**20
_COPIED_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".gguf")
"""Weights in other formats: never opened, and left behind, since a patch would not reach them."""


def create_working_checkpoint(source: Path, target: Path) -> tuple[FileState, ...]:
    """Copy a model's directory and return the state of each file that the registry follows.

    Args:
        source: directory of the subject.
        target: directory to create; it must not exist or be empty.

    Returns:
        The weight files (and an adapter's configuration) of the copy, hashed from the copy.

    Raises:
        SpaceError: the target is in use, cannot be written, or does not fit on its disk.
    """
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and _belongs(path, source)]
    require_space(target, sum(path.stat().st_size for path in files))
    if target.exists() and any(target.iterdir()):
        raise SpaceError(
            f"the working checkpoint {target} exists and is not empty", "name an empty directory with --working"
        )
    try:
        for path in files:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(path, copy)
        _sync_directory(target)
    except OSError as error:
        discard_working_checkpoint(target)
        raise SpaceError(
            f"the working checkpoint {target} cannot be written ({error.strerror or error})",
            "free space on that disk, mend its permissions, or name another directory with --working",
        ) from error
    followed = [path for path in sorted(target.iterdir()) if _is_followed(path)]
    return tuple(_state(path) for path in followed)


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


def _is_followed(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "adapter_config.json"


def _state(path: Path) -> FileState:
    status = path.stat()
    return FileState(file=path.name, size=status.st_size, modified_ns=status.st_mtime_ns, sha256=digest_file(path))


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        if not _reflink(reading.fileno(), writing.fileno()):
            shutil.copyfileobj(reading, writing, 8 * 2**20)
        writing.flush()
        os.fsync(writing.fileno())
    mode = stat.S_IMODE(source.stat().st_mode)
    target.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)


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
        if error.errno in {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}:
            return False
        raise
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
