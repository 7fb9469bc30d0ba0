"""Fixtures that every part's tests may use."""

from hypothesis import settings

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

# A deadline fails a test for what else the machine was doing.
settings.register_profile("neuronledger", deadline=None)
settings.load_profile("neuronledger")
