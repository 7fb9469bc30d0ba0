"""What docs/registry.md tells of the registry's tables and views is what is there, and its queries run."""

import re

import pytest
from sqlalchemy import inspect, text

from registry.database import Registry
from registry.schema import Base
from tests.registry.documented_sql import PAGE, QUERIES, query_title


def test_every_view_is_documented_with_its_columns(registry: Registry) -> None:
    documented = {
        name: re.findall(r"`(\w+)`", columns)
        for name, columns in re.findall(r"^\| `(v_\w+)` \|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    }
    inspector = inspect(registry.engine)
    present = {name: [column["name"] for column in inspector.get_columns(name)] for name in inspector.get_view_names()}
    assert documented == present


def test_every_table_is_documented() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {table for table in Base.metadata.tables if table not in named} == set()


@pytest.mark.parametrize("query", QUERIES, ids=query_title)
def test_every_documented_query_runs(registry: Registry, query: str) -> None:
    with registry.read() as session:
        assert session.execute(text(query)).all() == []


def test_every_view_has_an_example() -> None:
    assert {view for query in QUERIES for view in re.findall(r"FROM (v_\w+)", query)} == set(
        re.findall(r"^\| `(v_\w+)`", PAGE, re.MULTILINE)
    )
