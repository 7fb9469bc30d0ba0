"""What stands between the registry and its user is named, and says what to do."""

import os
import pwd
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError

from neuronledger import NeuronLedgerError
from registry import database
from registry.database import Registry, parse_url, upgrade
from registry.errors import RecordExistsError, RecordNotFoundError, RegistryBusyError, RegistryError
from registry.ledger import check_chain, events
from registry.queries import get_dimension, get_lineage, get_model, get_patch, require_absent
from registry.schema import Model, SafetyDimension
from tests.databases import PostgreSQLDatabases, SQLiteDatabases
from tests.registry.records import add_lineage, add_model, add_patch


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "not a database URL"),
        ("registry.db", "not a database URL"),
        ("sqlite://", "has to be a file"),
        ("sqlite:///:memory:", "has to be a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "has to be a file"),
        ("mysql://localhost/x", "cannot be kept in mysql"),
        ("postgresql+asyncpg://localhost/x", r"cannot be kept in postgresql\+asyncpg"),
    ],
)
def test_urls_that_cannot_hold_a_registry_are_refused(url: str, problem: str) -> None:
    with pytest.raises(RegistryError, match=problem):
        Registry.open(url, create=True)


def test_both_forms_of_the_postgresql_url_are_one() -> None:
    assert parse_url("postgresql://ada@host/db") == parse_url("postgresql+psycopg://ada@host/db")


def test_a_missing_registry_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="neuronledger init"):
        Registry.open(f"sqlite:///{tmp_path / 'registry.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be reached"):
        Registry.open(f"postgresql://ada:secret@/x?host={tmp_path}", create=True)


@pytest.mark.parametrize("secret", ["ada:secret@/x?host=", "ada@/x?password=secret&sslpassword=secret&host="])
def test_the_password_is_never_shown(tmp_path: Path, secret: str) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry.open(f"postgresql://{secret}{tmp_path}")
    assert "secret" not in str(caught.value)


def test_a_missing_database_on_a_server_is_named(postgresql_databases: PostgreSQLDatabases, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match='database "absent" does not exist'):
        Registry.open(postgresql_databases.url("absent"), directory=tmp_path)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database" * 100)
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    for create in (False, True):
        with pytest.raises(RegistryError, match="not a database"):
            Registry.open(url, create=create)


@pytest.mark.parametrize(
    ("statements", "named"),
    [
        (["CREATE TABLE models (id INTEGER)"], "has a table models"),
        (["CREATE TABLE notes (id INTEGER)"], "has a table notes"),
        (["CREATE TABLE alembic_version (version_num TEXT)", "INSERT INTO alembic_version VALUES ('000a')"], "000a"),
    ],
)
def test_a_database_of_something_else_is_named_and_left_as_it_is(
    tmp_path: Path, statements: list[str], named: str
) -> None:
    file = tmp_path / "registry.db"
    with sqlite3.connect(file) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    with pytest.raises(RegistryError, match=named) as refusal:
        upgrade(f"sqlite:///{file}")
    assert str(file) in str(refusal.value)
    with sqlite3.connect(file) as connection:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.close()
    assert tables == 1


def test_a_database_on_a_server_may_hold_other_tables_but_none_of_these_names(
    postgresql_databases: PostgreSQLDatabases, tmp_path: Path
) -> None:
    url = postgresql_databases.empty(tmp_path)
    with create_engine(url).begin() as connection:
        connection.execute(text("CREATE TABLE models (id INTEGER)"))
    with pytest.raises(RegistryError, match="has a table models"):
        upgrade(url)
    with create_engine(url).begin() as connection:
        connection.execute(text("ALTER TABLE models RENAME TO notes"))
    upgrade(url)


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="cannot be made"):
        Registry.open(f"sqlite:///{tmp_path / 'file' / 'registry.db'}", create=True)


def test_sqlite_is_opened_as_the_design_says(sqlite_registry: Registry) -> None:
    with sqlite_registry.write() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalar(text("PRAGMA synchronous")) == 2


def test_two_registries_in_one_directory_keep_their_heads_apart(tmp_path: Path) -> None:
    first = Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", create=True)
    second = Registry.open(f"sqlite:///{tmp_path / 'other.db'}", create=True)
    assert first.heads.path.name == "ledger-heads.jsonl"
    assert first.heads.path != second.heads.path


def test_a_reader_cannot_write(registry: Registry) -> None:
    with pytest.raises(NeuronLedgerError, match="cannot be written"), registry.read() as session:  # noqa: PT012
        session.add(SafetyDimension(name="terrorism", actor="ada"))
        session.flush()
    with registry.write() as session:
        session.add(SafetyDimension(name="terrorism", actor="ada"))


def test_a_reader_sees_one_state_while_another_writes(registry: Registry) -> None:
    with registry.read() as reading:
        assert reading.scalar(text("SELECT count(*) FROM safety_dimensions")) == 0
        with registry.write() as session:
            session.add(SafetyDimension(name="terrorism", actor="ada"))
        assert reading.scalar(text("SELECT count(*) FROM safety_dimensions")) == 0
    with registry.read() as reading:
        assert reading.scalar(text("SELECT count(*) FROM safety_dimensions")) == 1


def test_a_second_writer_is_told_to_wait(
    registry_url: str, registry_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    if registry_url.startswith("postgresql"):
        monkeypatch.setattr(database, "BUSY_SECONDS", 1)
    with Registry.open(registry_url, directory=registry_directory) as registry:
        with registry.write(), pytest.raises(RegistryBusyError) as caught, registry.write():
            pass
        assert caught.value.exit_code == 3
        with registry.write():
            pass


def test_writers_of_many_threads_keep_one_chain(registry: Registry) -> None:
    def write() -> None:
        for _ in range(5):
            with registry.write() as session:
                registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with registry.read() as session:
        chain = list(events(session))
    assert len(chain) == 20
    assert list(check_chain(chain)) == []
    assert len(registry.heads.read()) == 20


def test_a_full_disk_is_named_and_changes_nothing(sqlite_registry: Registry) -> None:
    with pytest.raises(RegistryError, match="is full"), sqlite_registry.write() as session:  # noqa: PT012
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages}"))
        for number in range(2000):
            session.add(SafetyDimension(name=f"dimension {number}", description="x" * 500, actor="ada"))
        session.flush()
    with sqlite_registry.read() as session:
        assert session.scalar(text("SELECT count(*) FROM safety_dimensions")) == 0


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Not root, who may write everywhere."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that others may enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_a_registry_without_permission_is_named(
    sqlite_databases: SQLiteDatabases, public_directory: Path, request: pytest.FixtureRequest
) -> None:
    url = sqlite_databases.migrated(public_directory)
    (public_directory / "registry.db").chmod(0o444)
    public_directory.chmod(0o555)
    request.getfixturevalue("unprivileged")
    with (
        pytest.raises(RegistryError, match="permission"),
        Registry.open(url) as registry,
        registry.write() as session,
    ):
        add_model(session, "llama")


def test_a_place_without_permission_is_named(public_directory: Path, request: pytest.FixtureRequest) -> None:
    public_directory.chmod(0o555)
    request.getfixturevalue("unprivileged")
    with pytest.raises(RegistryError, match="permission"):
        Registry.open(f"sqlite:///{public_directory / 'registry.db'}", create=True)


def test_a_head_file_that_cannot_be_written_refuses_the_change(sqlite_registry: Registry) -> None:
    sqlite_registry.heads.path.mkdir()
    with pytest.raises(RegistryError, match="head file"), sqlite_registry.write() as session:
        sqlite_registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")
    with sqlite_registry.read() as session:
        assert list(events(session)) == []


def test_a_head_file_that_fails_after_the_commit_says_that_the_change_is_kept(
    sqlite_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("registry.heads.os.write", fail)
    with pytest.raises(RegistryError, match="change is recorded"), sqlite_registry.write() as session:
        sqlite_registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")
    with sqlite_registry.read() as session:
        assert len(list(events(session))) == 1


def test_a_defect_of_ours_is_not_hidden(registry: Registry) -> None:
    with pytest.raises(DBAPIError, match="no_such_table"), registry.write() as session:
        session.execute(text("SELECT * FROM no_such_table"))


def test_a_writer_that_died_leaves_the_old_state_and_no_lock(sqlite_registry: Registry) -> None:
    path = parse_url(sqlite_registry.url).database
    assert path is not None
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO safety_dimensions VALUES (1, 'half', '', '2026-01-01T00:00:00.000000Z', 'ada')")
    other.close()
    with sqlite_registry.write() as session:
        assert session.scalars(select(SafetyDimension)).all() == []


def test_names_are_unique(registry: Registry) -> None:
    with registry.write() as session:
        add_model(session, "llama")
        require_absent(session, Model, "lama")
        with pytest.raises(RecordExistsError, match="'llama'"):
            require_absent(session, Model, "llama")
    with pytest.raises(RecordExistsError, match="model"), registry.write() as session:
        add_model(session, "llama")


def test_a_name_that_is_not_there_lists_the_nearest(registry: Registry) -> None:
    with registry.write() as session:
        with pytest.raises(RecordNotFoundError, match="neuronledger model register"):
            get_model(session, "llama")
        for name in ("llama-2-chat", "llama-2", "phi"):
            add_model(session, name)
        lineage = add_lineage(session, "assistant")
        with pytest.raises(RecordNotFoundError, match="neuronledger patch apply"):
            get_patch(session, lineage, 1)
        patch = add_patch(session, lineage)
    with registry.read() as session:
        assert get_model(session, "phi").name == "phi"
        assert get_lineage(session, "assistant").subject.modules[1].block == 1
        assert get_dimension(session, "assistant-1-applying").id == patch.dimension_id
        assert get_patch(session, lineage, 1).id == patch.id
        with pytest.raises(RecordNotFoundError, match=r"no patch 7.*Its patches are 1"):
            get_patch(session, lineage, 7)
        with pytest.raises(RecordNotFoundError, match=r"no model named 'lama-2'\. Did you mean llama-2, llama-2-chat"):
            get_model(session, "lama-2")
        with pytest.raises(RecordNotFoundError, match="Did you mean assistant"):
            get_lineage(session, "xyz")


def test_times_come_back_in_utc(registry: Registry) -> None:
    with registry.write() as session:
        add_model(session, "llama")
    with registry.read() as session:
        created = get_model(session, "llama").created_at
    assert created.utcoffset() is not None
    assert created.tzname() == "UTC"


def test_init_by_two_at_once_makes_one_registry(empty_url: str, registry_directory: Path) -> None:
    failures: list[NeuronLedgerError] = []

    def init() -> None:
        try:
            upgrade(empty_url)
        except NeuronLedgerError as error:
            failures.append(error)

    threads = [threading.Thread(target=init) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    Registry.open(empty_url, directory=registry_directory).close()
