"""The migrations and the mapped tables are one schema, and the registry opens only that one."""

from pathlib import Path
from typing import Any, cast

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from registry import failures
from registry.database import Registry, migrations_directory, parse_url, upgrade
from registry.errors import RegistryError
from registry.schema import SCHEMA_REVISION, Base, PromptSet
from tests.databases import Databases


def test_migrating_gives_the_mapped_tables(registry: Registry) -> None:
    with registry.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_migrating_gives_the_mapped_check_constraints(registry: Registry) -> None:
    inspector = inspect(registry.engine)
    for table in Base.metadata.tables.values():
        mapped = {str(check.name) for check in table.constraints if isinstance(check, CheckConstraint)}
        assert {check["name"] for check in inspector.get_check_constraints(table.name)} == mapped


def test_words_outside_the_design_are_refused_by_the_database(registry: Registry) -> None:
    with pytest.raises(IntegrityError, match="ck_prompt_sets_purpose"), registry.write() as session:
        session.add(PromptSet(purpose=cast("Any", "funny"), source="s", rows=1, digest="d"))


def test_words_are_the_same_in_both_files() -> None:
    migration = (migrations_directory() / "versions" / "v0001_first_schema.py").read_text()
    for table in Base.metadata.tables.values():
        for check in table.constraints:
            if isinstance(check, CheckConstraint):
                assert str(check.sqltext) in migration
    for message in (
        failures.LEDGER_IS_APPEND_ONLY,
        failures.LEDGER_CONTINUES,
        failures.NEURON_IS_PROTECTED,
        failures.CLAIM_IS_FIXED,
        failures.CLAIM_IS_APPLIED,
    ):
        assert message in migration


def test_names_fit_into_postgresql() -> None:
    """PostgreSQL cuts names at 63 bytes, and the migration would then not be found by its name."""
    for table in Base.metadata.tables.values():
        names = [table.name, *(str(item.name) for item in (*table.constraints, *table.indexes))]
        assert [name for name in names if len(name) > 63] == []


def test_the_code_names_the_newest_migration() -> None:
    configuration = Config()
    configuration.set_main_option("script_location", str(migrations_directory()))
    assert ScriptDirectory.from_config(configuration).get_current_head() == SCHEMA_REVISION


def test_init_twice_changes_nothing(empty_url: str, registry_directory: Path) -> None:
    with Registry.open(empty_url, create=True, directory=registry_directory) as registry, registry.write() as session:
        registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")
    with Registry.open(empty_url, create=True, directory=registry_directory) as registry, registry.read() as session:
        assert session.scalar(text("SELECT count(*) FROM ledger_events")) == 1


@pytest.mark.parametrize(("revision", "mend"), [("9999", "Upgrade neuronledger"), ("0000", "neuronledger init")])
def test_another_schema_is_refused(registry: Registry, registry_url: str, revision: str, mend: str) -> None:
    with registry.write() as session:
        session.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    with pytest.raises(RegistryError, match=mend):
        Registry.open(registry_url)


def test_init_does_not_touch_a_newer_schema(registry: Registry, registry_url: str) -> None:
    with registry.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryError, match="Upgrade neuronledger"):
        upgrade(registry_url)


def test_a_database_without_a_registry_is_refused(empty_url: str, registry_directory: Path) -> None:
    if empty_url.startswith("sqlite"):
        (registry_directory / "registry.db").touch()
    with pytest.raises(RegistryError, match="neuronledger init"):
        Registry.open(empty_url, directory=registry_directory)


def test_a_migration_that_fails_leaves_nothing(
    databases: Databases, empty_url: str, registry_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both databases have transactional DDL, if asked in the right way."""
    original = migrations_directory() / "versions" / "v0001_first_schema.py"
    copy = registry_directory / "migrations"
    (copy / "versions").mkdir(parents=True)
    for name in ("env.py", "script.py.mako"):
        (copy / name).write_text((migrations_directory() / name).read_text())
    broken = original.read_text().replace("    create_ledger()\n", "    op.execute('SELECT * FROM no_such_table')\n")
    assert broken != original.read_text()
    (copy / "versions" / "v0001_first_schema.py").write_text(broken)
    monkeypatch.setattr("registry.database.migrations_directory", lambda: copy)
    with pytest.raises(DBAPIError, match="no_such_table"):
        upgrade(empty_url)
    monkeypatch.undo()
    engine = create_engine(parse_url(empty_url))
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    upgrade(empty_url)
