"""Processes, by host, number and the moment they began: a number alone is used again in time."""

import os
import socket
from dataclasses import dataclass
from typing import Literal

import psutil

Liveness = Literal["alive", "dead", "unknown"]

_SAME_MOMENT_SECONDS = 2
"""How far two readings of when a process began may be apart: the clock of the machine is set now and then."""


@dataclass(frozen=True)
class Owner:
    """A process: of which host, its number, and when it began, in seconds since 1970."""

    host: str
    pid: int
    started: int

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())

    @property
    def liveness(self) -> Liveness:
        """Whether the process is there, as far as can be told from this host."""
        if self.host != socket.gethostname():
            return "unknown"
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "dead"
            return "alive" if abs(process.create_time() - self.started) <= _SAME_MOMENT_SECONDS else "dead"
        except psutil.NoSuchProcess:
            return "dead"
        except psutil.AccessDenied:
            return "alive"


def this_process() -> Owner:
    """The process that runs this."""
    return Owner(socket.gethostname(), os.getpid(), int(psutil.Process().create_time()))
