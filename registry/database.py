"""Opening the registry, and its two kinds of session.

SQLite by default: write-ahead log, foreign keys on, synchronous FULL, and BEGIN IMMEDIATE for writers, so that one
writer is in at a time and reads what the one before it committed. PostgreSQL gets the same from an advisory lock that
each writing transaction holds. Readers never wait and cannot write.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from registry.artifacts import ArtifactStore
from registry.claims import protected_error
from registry.errors import RegistryError
from registry.failures import claimed_twice, error_code, translate
from registry.head_lines import Head, Line, parse_lines
from registry.heads import HeadFile, Sign
from registry.ledger import APPENDED, append, ledger_head
from registry.schema import SCHEMA_REVISION, Base, LedgerEvent

DEFAULT_URL = "sqlite:///.neuronledger/registry.db"
DEFAULT_DIRECTORY = Path(".neuronledger")
BUSY_SECONDS = 10

Signer = Callable[[], Sign]

_WRITER_LOCK = 0x4E4C_4544_4745_5221
_MODE = "neuronledger_mode"


@dataclass(frozen=True)
class Registry:
    """An open registry: the database, the artifact store and the ledger heads beside it.

    Attributes:
        url: the database URL, without its password.
        directory: where artifacts and ledger heads lie.
        signer: called before a commit for what signs its head; heads are not signed if there is none.
    """

    url: str
    engine: Engine
    directory: Path
    store: ArtifactStore
    heads: HeadFile
    signer: Signer | None = None

    @classmethod
    def open(
        cls,
        url: str = DEFAULT_URL,
        *,
        create: bool = False,
        directory: Path | None = None,
        signer: Signer | None = None,
    ) -> "Registry":
        """Open a registry of this code's schema.

        Args:
            url: `sqlite:///PATH`, `postgresql://…` or `postgresql+psycopg://…`.
            create: make the registry, or bring an older one to this code's schema, first.
            directory: where artifacts and ledger heads lie; beside the SQLite file, or `.neuronledger`, if left out.
            signer: gives what signs the heads, or raises, so that nothing is committed.

        Raises:
            RegistryError: missing, not reachable, not writable, of an older or of a newer schema, or not a usable URL.
            RegistryBusyError: another writer holds it while it is to be created.
        """
        address = parse_url(url)
        directory, heads = _places(address, directory)
        if create:
            upgrade(url)
        elif address.database and _is_sqlite(address) and not Path(address.database).is_file():
            raise RegistryError(f"there is no registry at {address.database}", "Run `neuronledger init`")
        engine = _engine(address)
        store = ArtifactStore(directory / "artifacts")
        registry = cls(_shown(address), engine, directory, store, HeadFile(heads), signer)
        try:
            with registry.read() as session:
                _require_schema(_revision(session.connection()), registry.url)
        except BaseException:
            engine.dispose()
            raise
        return registry

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one writing transaction: committed at the end, rolled back on any error.

        After the commit the ledger's head is appended to the head file, if an event was appended.

        Raises:
            RegistryBusyError: another writer held the registry or the head file for longer than ten seconds, or took
                the patch's sequence number.
            NeuronProtectedError: a neuron was claimed a second time.
            RecordExistsError: a name is taken.
            LedgerError: an event was to be changed or removed.
            RegistryError: the database cannot be written, or is full, or damaged; or, with the change already
                committed, the head file cannot be written.
        """
        engine = self.engine.execution_options(**{_MODE: "write"})
        with ExitStack() as until_the_head_is_written:
            with self._translated(), Session(engine, expire_on_commit=False) as session, session.begin():
                session.connection()
                yield session
                if APPENDED in session.info:
                    sign = self.signer() if self.signer is not None else None
                    heads = until_the_head_is_written.enter_context(self.heads.held())
            if (head := session.info.pop(APPENDED, None)) is not None:
                heads.append(Head(*head), sign)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the registry and cannot write it.

        Raises:
            RegistryError: the database cannot be read.
        """
        options: dict[str, Any] = {_MODE: "read"}
        if self.engine.dialect.name == "postgresql":
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        engine = self.engine.execution_options(**options)
        with self._translated(), Session(engine, autoflush=False) as session:
            yield session

    @contextmanager
    def read_with_heads(self) -> Iterator[tuple[Session, tuple[Line, ...]]]:
        """A session as `read` gives it, and the lines of the head file at the state that it sees.

        No commit lies between the two: what the heads lack, a process that died or failed left out, or somebody
        removed.

        Raises:
            RegistryError: the database or the head file cannot be read.
            RegistryBusyError: a writer held the head file for longer than ten seconds.
        """
        with self.read() as session:
            while True:
                with self.heads.shared() as content:
                    count, _ = ledger_head(session)  # from here on the session sees this state
                if content is not None or not count or not self.heads.path.exists():
                    break
                session.rollback()  # the file was made while we looked, with the first commit
            yield session, parse_lines(content or b"")

    def record(
        self,
        session: Session,
        *,
        action: str,
        subject_kind: str,
        subject_name: str,
        payload: Mapping[str, Any],
        actor: str,
        now: datetime | None = None,
    ) -> LedgerEvent:
        """Append a ledger event in a session from `write`. See `registry.ledger.append`."""
        return append(
            session,
            action=action,
            subject_kind=subject_kind,
            subject_name=subject_name,
            payload=payload,
            actor=actor,
            now=now,
        )

    def complete_heads(self) -> bool:
        """Append the ledger's head to the head file where a kill came between a commit and its head.

        Returns:
            whether it was missing.

        Raises:
            RegistryError: the file cannot be read or written.
            RegistryBusyError: somebody held the file for longer than ten seconds.
        """
        with self.read() as session:
            if ledger_head(session)[0] == 0:
                return False
        with self.heads.held() as heads, self.read() as session:
            last = session.scalars(select(LedgerEvent).order_by(LedgerEvent.sequence.desc()).limit(1)).one()
            return heads.append(Head(last.sequence, last.hash, last.created_at), self._sign_if_missing)

    def _sign_if_missing(self, head: Head) -> Head:
        return head if self.signer is None else self.signer()(head)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if isinstance(error, IntegrityError) and (key := claimed_twice(error)) is not None:
                with self.read() as session:
                    named = protected_error(session, *key)
                raise named from error
            if (translated := translate(error, self.url)) is None:
                raise
            raise translated from error


def upgrade(url: str) -> None:
    """Create the registry's schema, or bring an older one to this code's, in one transaction.

    Raises:
        RegistryError: the place cannot be written or reached, holds something else, or the schema is newer than this
            code.
        RegistryBusyError: another writer holds the registry.
    """
    address = parse_url(url)
    if _is_sqlite(address):
        parent = Path(str(address.database)).parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(
                f"the directory {parent} cannot be made: {error.strerror}", "Choose another place with --database"
            ) from error
    engine = _engine(address)
    try:
        if _is_sqlite(address):
            _keep_write_ahead_log(engine, _shown(address))
        with engine.execution_options(**{_MODE: "write"}).begin() as connection:
            current = _revision(connection)
            if current is not None and current > SCHEMA_REVISION:
                _require_schema(current, _shown(address))
            if current is None:
                _require_room(connection, _shown(address), set(Base.metadata.tables))
            if current != SCHEMA_REVISION:
                _migrate(connection, _shown(address))
    except DBAPIError as error:
        if (translated := translate(error, _shown(address))) is None:
            raise
        raise translated from error
    finally:
        engine.dispose()


def _keep_write_ahead_log(engine: Engine, place: str) -> None:
    """Switch a SQLite file to WAL: a property of the file, which cannot be changed inside a transaction.

    While another connection opens the log, SQLite refuses this at once, however long it was told to wait.

    Raises:
        RegistryError: the file is the database of something else; it is left as it is.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with engine.connect().execution_options(**{_MODE: "plain"}) as connection:
                _require_room(connection, place)
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        except OperationalError as error:
            if not error_code(error).startswith("SQLITE_BUSY") or time.monotonic() > give_up:
                raise
            time.sleep(0.02)
        else:
            return


def _require_room(connection: Connection, place: str, wanted: Collection[str] | None = None) -> None:
    """Refuse a database that is in use by something else.

    Args:
        connection: to the database.
        place: its URL, for people.
        wanted: tables that are to be made; None: a table of any name is one too many.

    Raises:
        RegistryError: naming a table.
    """
    tables = inspect(connection).get_table_names()
    taken = [name for name in tables if wanted is None or name in wanted]
    if taken and "alembic_version" not in tables:
        raise RegistryError(
            f"{place} is the database of something else: it has a table {taken[0]} and holds no registry",
            "Choose another place with --database",
        )


def parse_url(url: str) -> URL:
    """The database URL, with PostgreSQL's driver filled in and `~` expanded.

    Raises:
        RegistryError: not a URL, another database, or a SQLite database in memory.
    """
    mend = "Give sqlite:///PATH or postgresql://USER@HOST/DATABASE"
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise RegistryError("the registry's URL is not a database URL", mend) from error
    if address.drivername in {"postgresql", "postgres", "postgresql+psycopg"}:
        return address.set(drivername="postgresql+psycopg")
    if address.drivername not in {"sqlite", "sqlite+pysqlite"}:
        raise RegistryError(f"the registry cannot be kept in {address.drivername}", mend)
    if not address.database or address.database == ":memory:" or address.database.startswith("file:"):
        raise RegistryError("a registry has to be a file, and its URL names none", mend)
    return address.set(database=str(Path(address.database).expanduser()))


def migrations_directory() -> Path:
    """Where the Alembic environment lies, in a checkout as in an installed wheel."""
    place = Path(__file__).resolve().parents[1] / "migrations"
    if not (place / "env.py").is_file():
        raise RegistryError("the migrations are missing from this installation", "Install neuronledger again")
    return place


def _migrate(connection: Connection, place: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    configuration = Config()
    configuration.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    configuration.attributes["connection"] = connection
    try:
        command.upgrade(configuration, "head")
    except CommandError as error:
        raise RegistryError(
            f"{place} is the database of something else: its schema is of no known revision ({error})",
            "Choose another place with --database",
        ) from error


def _engine(address: URL) -> Engine:
    if _is_sqlite(address):
        engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        engine = create_engine(address)
    except ModuleNotFoundError as error:
        raise RegistryError(
            "a registry in PostgreSQL needs the package psycopg", "Run `pip install 'neuronledger[postgresql]'`"
        ) from error
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions late, and never IMMEDIATE
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    mode = connection.get_execution_options().get(_MODE)
    if mode == "plain":
        return
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if mode == 'write' else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if mode == "write" else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_MODE) == "write":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")


def _revision(connection: Connection) -> str | None:
    """The schema's revision, or None for a database without one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _require_schema(revision: str | None, place: str) -> None:
    if revision == SCHEMA_REVISION:
        return
    if revision is None:
        raise RegistryError(f"{place} holds no registry", "Run `neuronledger init`")
    if revision > SCHEMA_REVISION:
        raise RegistryError(
            f"the registry {place} has schema {revision}, and this neuronledger knows up to {SCHEMA_REVISION}",
            "Upgrade neuronledger",
        )
    raise RegistryError(
        f"the registry {place} has the older schema {revision}", "Run `neuronledger init` to migrate it"
    )


def _places(address: URL, directory: Path | None) -> tuple[Path, Path]:
    """The directory of artifacts, and the head file: one per database, so that two in one directory do not mix."""
    if _is_sqlite(address):
        file = Path(str(address.database))
        directory = directory or file.parent
        name = "ledger-heads.jsonl" if file.stem == "registry" else f"{file.stem}.ledger-heads.jsonl"
    else:
        directory = directory or DEFAULT_DIRECTORY
        name = f"{address.database or 'postgresql'}.ledger-heads.jsonl".replace("/", "_")
    return directory, directory / name


def _is_sqlite(address: URL) -> bool:
    return address.get_backend_name() == "sqlite"


def _shown(address: URL) -> str:
    hidden = {key: "***" for key in address.query if "password" in key.lower()}
    return address.update_query_dict(hidden).render_as_string(hide_password=True)
