"""A process is called dead only where that is sure: its locks and its files are taken away then."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from registry import processes
from registry.processes import Liveness, Owner, process_with, this_process

INITIAL = 4026531836
OTHER_PID = 2**22 + 1


@dataclass(frozen=True)
class System:
    """What a Linux tells of itself and its processes, in a directory."""

    directory: Path

    def set(self, *, machine: str = "4e5a", boot: str = "84d95e44-f650-42e7", namespace: int = INITIAL) -> None:
        """Be a machine, since a boot, and see the processes of a namespace."""
        (self.directory / "machine-id").write_text(machine)
        (self.directory / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
        link = self.directory / "self/ns/pid"
        link.unlink(missing_ok=True)
        link.symlink_to(f"pid:[{namespace}]")

    def show(self, pid: int | str, started: int, state: str = "S", number: int | None = None) -> None:
        """Show a process as `/proc/PID/stat` does."""
        (self.directory / str(pid)).mkdir(exist_ok=True)
        fields = " ".join([state, *["0"] * 18, str(started), "0"])
        (self.directory / str(pid) / "stat").write_text(f"{number or pid} (a) 1 (b) {fields}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "self/ns").mkdir(parents=True)
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    monkeypatch.setattr(processes, "_MACHINE_ID", tmp_path / "machine-id")
    made = System(tmp_path)
    made.set()
    made.show("self", 500, number=os.getpid())
    made.show(OTHER_PID, 700)
    return made


@pytest.fixture
def other(system: System) -> Owner:
    """A process that lives."""
    found = process_with(OTHER_PID)
    assert found == Owner(this_process().place, OTHER_PID, 700)
    assert found.liveness == "alive"
    return found


def _signalling(monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    def kill(pid: int, signal: int) -> None:
        assert (pid, signal) == (OTHER_PID, 0)
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)


@pytest.mark.parametrize("started", [697, 703])
def test_a_process_that_began_at_another_moment_is_another(other: Owner, started: int) -> None:
    assert replace(other, started=started).liveness == "dead"


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_process_that_only_waits_to_be_asked_how_it_ended_is_dead(system: System, other: Owner, state: str) -> None:
    system.show(OTHER_PID, 700, state)
    assert other.liveness == "dead"


def test_a_process_lives_on_when_the_clock_is_set(other: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil reckons when a process began from the clock, which is set now and then."""
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 3600)
    assert other.liveness == "alive"
    assert this_process().is_this_process


@pytest.mark.parametrize(
    ("error", "expected"),
    [(PermissionError(), "alive"), (None, "alive"), (ProcessLookupError(), "dead"), (OverflowError(), "dead")],
)
def test_a_process_that_is_not_shown_is_asked_for(
    system: System, other: Owner, monkeypatch: pytest.MonkeyPatch, error: OSError | None, expected: Liveness
) -> None:
    """Mounted with `hidepid`, `/proc` hides what runs as another user."""
    (system.directory / str(OTHER_PID) / "stat").unlink()
    _signalling(monkeypatch, error)
    assert other.liveness == expected


def test_numbers_of_another_namespace_are_not_looked_up(
    system: System, other: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container shows that mounted no `/proc` of its own."""
    system.show("self", 500, number=os.getpid() + 1)
    system.show(OTHER_PID, 9)
    _signalling(monkeypatch, None)
    assert other.liveness == "alive"
    assert this_process().started == 500


def _of_another_host(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "another.example")


def _of_another_machine(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.set(machine="9999", boot="another")


def _in_another_namespace(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.set(namespace=4026532999)


def _in_a_container_after_another_boot(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.set(boot="another", namespace=4026532999)


def _after_a_boot_that_is_not_told(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    (system.directory / "sys/kernel/random/boot_id").unlink()


@pytest.mark.parametrize(
    "move",
    [
        _of_another_host,
        _of_another_machine,
        _in_another_namespace,
        _in_a_container_after_another_boot,
        _after_a_boot_that_is_not_told,
    ],
)
def test_of_another_place_nothing_is_known(
    system: System, other: Owner, monkeypatch: pytest.MonkeyPatch, move: Callable[[System, pytest.MonkeyPatch], None]
) -> None:
    mine = this_process()
    (system.directory / str(OTHER_PID) / "stat").unlink()
    move(system, monkeypatch)
    assert other.liveness == "unknown"
    assert not mine.is_this_process


def test_no_process_outlives_its_boot(system: System, other: Owner) -> None:
    system.set(boot="another")
    assert other.liveness == "dead"


def test_without_the_id_of_a_machine_another_boot_may_be_another_machine(system: System) -> None:
    (system.directory / "machine-id").unlink()
    other = process_with(OTHER_PID)
    assert other is not None
    assert other.liveness == "alive"
    (system.directory / "sys/kernel/random/boot_id").write_text("another")
    assert other.liveness == "unknown"


@pytest.mark.parametrize("place", ["", socket.gethostname(), "a+b+c", "a+b+c+d+e"])
def test_of_a_place_in_another_form_nothing_is_known(system: System, place: str) -> None:
    assert Owner(place, OTHER_PID, 1).liveness == "unknown"
    assert Owner(place, os.getpid(), 500).liveness == "unknown"


def test_a_system_without_proc_is_asked_through_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    monkeypatch.setattr(processes, "_MACHINE_ID", tmp_path / "machine-id")
    mine = this_process()
    assert mine == Owner(f"{mine.host}+-+-+-", os.getpid(), int(psutil.Process().create_time()))
    assert mine.is_this_process
    assert mine.liveness == "alive"
    assert replace(mine, started=mine.started - 60).liveness == "dead"
    assert replace(mine, pid=OTHER_PID).liveness == "dead"


@pytest.mark.parametrize("host", ["node", "node-7.example.org", "käthe/../..", "x" * 255])
def test_files_are_named_after_a_process(system: System, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    mine = this_process()
    assert Owner.named(mine.name) == mine
    assert len(mine.name) < 150
    assert not {"/", "\\", ":"} & set(mine.name)
    assert mine.name.isascii()
    assert "+" not in mine.host


@pytest.mark.parametrize("name", ["", "place", "a.b", "place.1.x", "1893456000.77.host", ".line.0f0f"])
def test_other_names_are_no_process(name: str) -> None:
    assert Owner.named(name) is None
