"""Child processes of a test: forked, so that they start in milliseconds, and ended without the test run's clean-up.

What a child does has to open connections of its own, and the parent must have closed its own before it forks.
"""

import gc
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass

_LONGEST_SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        signal: the signal that killed it; None if it ended by itself.
        failed: whether it raised.
        told: what it returned as text, or the traceback of what it raised.
    """

    signal: int | None
    failed: bool
    told: str


@dataclass(frozen=True)
class Child:
    """A running child process."""

    pid: int
    pipe: int

    def wait(self) -> Ended:
        """Wait until it has ended."""
        with os.fdopen(self.pipe, "rb") as pipe:
            told = pipe.read().decode()
        _, status = os.waitpid(self.pid, 0)
        killer = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return Ended(killer, os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0, told)


def fork(act: Callable[[], object]) -> Child:
    """Run `act` in a child process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _live(act, writing)
    os.close(writing)
    return Child(pid, reading)


def _live(act: Callable[[], object], pipe: int) -> None:
    """The child's whole life."""
    failed = 1
    gc.disable()  # it would touch, and so copy, every object of the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LONGEST_SECONDS)
    try:
        os.write(pipe, str(act()).encode())
        failed = 0
    except BaseException:  # noqa: BLE001  told to the parent
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(failed)
