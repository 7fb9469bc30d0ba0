"""Fixtures that every part's tests may use."""

import pytest
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
from tests.fault_tally import TALLY, Tally

# A deadline fails a test for what else the machine was doing.
settings.register_profile("neuronledger", deadline=None)
settings.load_profile("neuronledger")


@pytest.fixture(scope="session")
def fault_tally(pytestconfig: pytest.Config) -> Tally:
    """Counts the points at which tests let something fail, for the last line of the run."""
    return pytestconfig.stash.setdefault(TALLY, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many faults were tried, if any."""
    tally = config.stash.get(TALLY, Tally())
    if tally.points:
        terminalreporter.write_line(str(tally))
