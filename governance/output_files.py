"""Files that are handed out: written under a name of their own, flushed, and then given their name."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from governance.errors import InputError, SpaceError
from registry.files import sync_directory


def require_free(target: Path, *, force: bool) -> None:
    """Refuse to write over something.

    Raises:
        InputError: the path is a directory, or a file and may not be replaced, or its directory is not there.
    """
    if target.is_dir():
        raise InputError(f"{target} is a directory", "name a file in it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a directory", "make it first")
    if target.exists() and not force:
        raise InputError(f"{target} exists", "name another file, or replace it with --force")


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Give a free name in the directory of `target`; what is still there at exit is removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.writing")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Give a flushed file its name.

    Raises:
        SpaceError: the file cannot be renamed; it is gone then.
    """
    try:
        temporary.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        if not temporary.exists():
            target.unlink(missing_ok=True)
        raise SpaceError(
            f"{target} cannot be written: {error.strerror or error}", "mend the permissions of its directory"
        ) from error
