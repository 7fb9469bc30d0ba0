"""Fixtures that every part's tests may use."""

from tests.databases import (  # noqa: F401  pytest finds fixtures by name here
    databases,
    empty_url,
    postgresql_databases,
    registry,
    registry_directory,
    registry_url,
    sqlite_databases,
    sqlite_registry,
)
