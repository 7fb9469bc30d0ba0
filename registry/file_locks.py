"""Locks of the operating system on an open file: they go with the process that holds them, however it ends."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager

from registry.errors import RegistryBusyError

LONGEST_WAIT_SECONDS = 10
_PAUSE_SECONDS = 0.005


@contextmanager
def file_lock(descriptor: int, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on an open file, alone or together with others who share it.

    Args:
        descriptor: the open file. Threads that open it each for themselves exclude each other too.
        what: names the file in the error.
        shared: let others hold it at the same time who share it as well.

    Raises:
        RegistryBusyError: somebody else held it for longer than ten seconds.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows; there only the database keeps writers apart
        yield
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise
        if time.monotonic() > deadline:
            raise RegistryBusyError(f"{what} is held by another process", "Wait until it is done and try again")
        time.sleep(_PAUSE_SECONDS)
    try:
        yield
    finally:
        # Closing would not do: a process that was forked meanwhile has the same open file.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
