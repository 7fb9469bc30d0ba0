"""The head file: lines in the order of the commits, whoever writes, and whatever a kill or a full disk left."""

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from registry import file_locks
from registry.database import Registry
from registry.errors import RegistryBusyError, RegistryError
from registry.head_lines import Head, MalformedHead, check_ledger
from registry.heads import HeadFile
from registry.ledger import events
from tests.lock_step import Together, Wait, in_processes, in_threads
from tests.processes import fork

AT = "2026-01-02T03:04:05.000006Z"


def _record(registry: Registry, **changed: Any) -> None:
    fields = {"action": "a", "subject_kind": "k", "subject_name": "n", "payload": {"x": 1}, "actor": "ada"} | changed
    with registry.write() as session:
        registry.record(session, **fields)


def _problems(registry: Registry) -> list[str]:
    with registry.read_with_heads() as (session, lines):
        return [violation.problem for violation in check_ledger(lines, events(session))]


def _counts(registry: Registry) -> list[tuple[int, int]]:
    return [(head.after, head.count) for head in registry.heads.read() if isinstance(head, Head)]


def test_every_commit_appends_a_line_that_says_what_it_comes_after(registry: Registry) -> None:
    _record(registry)
    with registry.write() as session:
        for _ in range(3):
            registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")
    _record(registry)
    assert _counts(registry) == [(0, 1), (1, 4), (4, 5)]
    assert _problems(registry) == []


@pytest.mark.parametrize("together", [in_threads, in_processes])
def test_writers_at_once_leave_a_line_for_every_commit_in_order(
    registry_url: str, registry_directory: Path, together: Together
) -> None:
    writers, commits = 6, 8

    def writer(number: int, wait: Wait) -> str:
        with Registry.open(registry_url, directory=registry_directory) as registry:
            wait()
            for _ in range(commits):
                _record(registry, actor=f"writer {number}")
        return "done"

    assert together(writer, writers) == ["done"] * writers
    with Registry.open(registry_url, directory=registry_directory) as registry:
        assert _counts(registry) == [(number, number + 1) for number in range(writers * commits)]
        assert _problems(registry) == []


def test_a_check_between_commits_and_heads_raises_no_false_alarm(registry_url: str, registry_directory: Path) -> None:
    done = multiprocessing.get_context("fork").Event()

    def write() -> None:
        with Registry.open(registry_url, directory=registry_directory) as registry:
            for _ in range(40):
                _record(registry)
        done.set()

    child = fork(write)
    checks = 0
    with Registry.open(registry_url, directory=registry_directory) as registry:
        while not done.is_set() or not checks:
            assert _problems(registry) == []
            checks += 1
    ended = child.wait()
    assert not ended.failed, ended.told


def test_a_commit_without_its_head_is_named_while_nobody_writes(registry: Registry) -> None:
    for _ in range(3):
        _record(registry)
    content = registry.heads.path.read_bytes()
    registry.heads.path.write_bytes(b"".join(content.splitlines(keepends=True)[:1]))
    (problem,) = _problems(registry)
    assert "the ledger has 3 events, but the last head is of event 1" in problem
    assert registry.complete_heads()
    assert _counts(registry) == [(0, 1), (1, 3)]
    assert _problems(registry) == []
    assert not registry.complete_heads()


def test_a_head_that_a_kill_kept_from_the_file_is_completed(registry: Registry) -> None:
    _record(registry)
    first = registry.heads.path.read_bytes()
    _record(registry)
    whole = registry.heads.path.read_bytes()
    registry.heads.path.write_bytes(first)
    assert registry.complete_heads()
    assert registry.heads.path.read_bytes() == whole
    assert not registry.complete_heads()


@pytest.mark.parametrize("torn", [1, 20])
def test_a_line_that_a_full_disk_left_unfinished_gives_way_to_the_next(sqlite_registry: Registry, torn: int) -> None:
    """Of a head without its line's end only the end is missing; anything shorter is evidence of nothing."""
    for _ in range(2):
        _record(sqlite_registry)
    path = sqlite_registry.heads.path
    whole = path.read_bytes()
    for mend in (sqlite_registry.complete_heads, lambda: _record(sqlite_registry)):
        path.write_bytes(whole[:-torn])
        assert any("is not finished" in problem for problem in _problems(sqlite_registry))
        mend()
        assert _problems(sqlite_registry) == []
        if mend == sqlite_registry.complete_heads:
            assert path.read_bytes() == whole


def test_a_file_of_an_earlier_version_keeps_nobody_from_writing_and_can_be_put_away(registry: Registry) -> None:
    for _ in range(2):
        _record(registry)
    path = registry.heads.path
    with registry.read() as session:
        old = [
            f'{{"at":"{event.created_at}","count":{event.sequence},"hash":"{event.hash}"}}' for event in events(session)
        ]
    path.write_text("\n".join(old) + "\n")
    _record(registry)
    assert _counts(registry) == [(0, 3)]
    (problem,) = _problems(registry)
    assert "earlier version" in problem
    path.rename(path.with_suffix(".old"))
    assert registry.complete_heads()
    assert _counts(registry) == [(0, 3)]
    assert _problems(registry) == []


def test_a_line_that_is_no_head_stays_for_the_check_and_the_next_follows_the_last_head(registry: Registry) -> None:
    _record(registry)
    with registry.heads.path.open("ab") as file:
        file.write(b"x" * 10_000 + b"\n\n")
    _record(registry)
    assert _counts(registry) == [(0, 1), (1, 2)]
    (problem,) = _problems(registry)
    assert problem.startswith("each of the lines 2 to 3 of the ledger head file is not a head")


def test_a_head_of_a_shorter_ledger_has_nothing_to_append(tmp_path: Path) -> None:
    file = HeadFile(tmp_path / "deep" / "heads.jsonl")
    with file.held() as held:
        assert held.append(Head(7, "a" * 64, AT))
        assert not held.append(Head(7, "b" * 64, AT))
        assert not held.append(Head(6, "b" * 64, AT))
        assert held.append(Head(9, "b" * 64, AT))
    assert file.read() == (Head(7, "a" * 64, AT, 0), Head(9, "b" * 64, AT, 7))


def test_a_file_of_many_chunks_is_read_back_to_its_last_head(tmp_path: Path) -> None:
    file = HeadFile(tmp_path / "heads.jsonl")
    file.path.write_bytes(Head(3, "a" * 64, AT).line().encode() + b"\n" + b"no head\n" * 3000 + b"y" * 9000)
    with file.held() as held:
        assert held.append(Head(5, "c" * 64, AT))
    lines = file.read()
    assert lines[-1] == Head(5, "c" * 64, AT, 3)
    assert sum(isinstance(line, MalformedHead) for line in lines) == 3000


def test_a_file_that_somebody_holds_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = HeadFile(tmp_path / "heads.jsonl")
    monkeypatch.setattr(file_locks, "LONGEST_WAIT_SECONDS", 0.05)
    with file.held():
        for attempt in (file.held, file.shared):
            with (
                pytest.raises(RegistryBusyError, match=r"head file .* is held by another process") as caught,
                attempt(),
            ):
                pass
            assert caught.value.exit_code == 3
    with file.shared(), file.shared(), pytest.raises(RegistryBusyError), file.held():
        pass
    monkeypatch.setattr(file_locks, "LONGEST_WAIT_SECONDS", 10)
    waited: list[bool] = []

    def wait() -> None:
        with file.held() as held:
            waited.append(held.append(Head(1, "a" * 64, AT)))

    with file.shared():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        assert waited == []
    thread.join()
    assert waited == [True]


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    file = HeadFile(tmp_path / "heads.jsonl")
    reading, writing = os.pipe()
    with file.held():
        child = fork(lambda: os.read(reading, 1))
    with file.held():
        os.write(writing, b"x")
    assert not child.wait().failed


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RegistryError, match="cannot be locked: No locks available"), HeadFile(tmp_path / "h").held():
        pass
