"""Processes, by place, number and the moment they began: a number alone is used again in time.

A place is where a number means one process: the host, its machine, the boot since which it runs, and the namespace of
process numbers, of which every container has its own. It is written `HOST+MACHINE+BOOT+NAMESPACE`, in characters that
names of files can hold, with `-` for what a system does not tell. A process is called dead only where that is sure,
since its locks and its files are then taken away; what a record in an older form, with the host alone, tells is not.
"""

import hashlib
import os
import re
import socket
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, Self

import psutil

Liveness = Literal["alive", "dead", "unknown"]

_PROC = Path("/proc")
_MACHINE_ID = Path("/etc/machine-id")
_INITIAL_NAMESPACE = "4026531836"
"""The namespace of process numbers that Linux begins with: its processes end with the boot."""

_UNTOLD = "-"
_HOST_LENGTH = 64
_PART_LENGTH = 12

_SAME_START = 2
"""How far two readings of when a process began may be apart: psutil may reckon it from the clock, which is set."""


@dataclass(frozen=True)
class Owner:
    """A process: its place, its number, and when it began.

    Attributes:
        place: `HOST+MACHINE+BOOT+NAMESPACE`.
        pid: its number.
        started: in clock ticks since the boot where `/proc` tells them, else in seconds since 1970.
    """

    place: str
    pid: int
    started: int

    @classmethod
    def named(cls, name: str) -> Self | None:
        """The process that a file or directory is named after; None if it is named after none."""
        try:
            place, pid, started = name.rsplit(".", 2)
            return cls(place, int(pid), int(started))
        except ValueError:
            return None

    @property
    def name(self) -> str:
        """What its files are named after it."""
        return f"{self.place}.{self.pid}.{self.started}"

    @property
    def host(self) -> str:
        """The name of its host alone, for people."""
        return self.place.split("+")[0]

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks."""
        return self == this_process()

    @property
    def liveness(self) -> Liveness:
        """Whether the process is there, as far as can be told from here."""
        there, here = _parse_place(self.place), _this_place()
        if there is None or (there.host, there.machine) != (here.host, here.machine):
            return "unknown"
        if there.boot != here.boot:
            told = _UNTOLD not in (here.machine, there.boot, here.boot)
            both_initial = there.namespace == here.namespace == _INITIAL_NAMESPACE
            return "dead" if told and both_initial else "unknown"
        if there.namespace != here.namespace:
            return "unknown"
        found = _find(self.pid)
        if found is None:
            return "alive" if _is_there(self.pid) else "dead"
        return "alive" if not found.ended and abs(found.started - self.started) <= _SAME_START else "dead"


def this_process() -> Owner:
    """The process that runs this."""
    process = process_with(os.getpid())
    if process is None:
        raise psutil.NoSuchProcess(os.getpid())
    return process


def process_with(pid: int) -> Owner | None:
    """The process of this place that has a number, if the system shows one."""
    found = _find(pid)
    return None if found is None else Owner("+".join(astuple(_this_place())), pid, found.started)


@dataclass(frozen=True)
class _Place:
    host: str
    machine: str
    boot: str
    namespace: str


@dataclass(frozen=True)
class _Found:
    ended: bool
    started: int


def _this_place() -> _Place:
    machine = _content(_MACHINE_ID)
    try:
        namespace = (_PROC / "self" / "ns" / "pid").readlink().name
    except OSError:
        namespace = ""
    return _Place(
        host=re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())[:_HOST_LENGTH],
        # Other programs are not to be told a machine's id itself, says machine-id(5).
        machine=hashlib.sha256(f"neuronledger {machine}".encode()).hexdigest()[:_PART_LENGTH] if machine else _UNTOLD,
        boot=_content(_PROC / "sys" / "kernel" / "random" / "boot_id").replace("-", "")[:_PART_LENGTH] or _UNTOLD,
        namespace="".join(filter(str.isdigit, namespace)) or _UNTOLD,
    )


def _parse_place(place: str) -> _Place | None:
    parts = place.split("+")
    return _Place(*parts) if len(parts) == 4 else None


def _find(pid: int) -> _Found | None:
    """What the system shows of a process of this place; None where it shows none."""
    own = _PROC / "self" / "stat"
    if own.exists():
        stat = own.read_text(errors="replace")
        if pid != os.getpid():
            # One that was mounted in another namespace has other processes under the numbers of this one.
            shows_this_namespace = stat.startswith(f"{os.getpid()} ")
            stat = _content(_PROC / str(pid) / "stat") if shows_this_namespace else ""
        fields = stat.rpartition(")")[2].split()  # the command before it may hold anything
        return _Found(fields[0] in {"Z", "X"}, int(fields[19])) if fields else None
    try:
        process = psutil.Process(pid)
        return _Found(process.status() == psutil.STATUS_ZOMBIE, int(process.create_time()))
    except psutil.Error:
        return None


def _is_there(pid: int) -> bool:
    """Whether a number is some process's, also one that is hidden from this user."""
    if os.name == "nt":  # to send no signal, as below, is to send one there
        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _content(path: Path) -> str:
    """The text of a small file of the system; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
