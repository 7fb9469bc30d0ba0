"""Fixtures that every part's tests may use."""

from typing import Any

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
from tests.fault_tally import EDIT_TALLY, TALLY, EditTally, Tally, add_tallies, tallies

# A deadline fails a test for what else the machine was doing.
settings.register_profile("neuronledger", deadline=None)
settings.load_profile("neuronledger")


@pytest.fixture(scope="session")
def fault_tally(pytestconfig: pytest.Config) -> Tally:
    """Counts the points at which tests let something fail, for the last line of the run."""
    return pytestconfig.stash.setdefault(TALLY, Tally())


@pytest.fixture(scope="session")
def edit_tally(pytestconfig: pytest.Config) -> EditTally:
    """Counts the edits of the record that tests try, for the last lines of the run."""
    return pytestconfig.stash.setdefault(EDIT_TALLY, EditTally())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In one of several processes: hand the counts to the one that reports."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["tallies"] = tallies(session.config.stash)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """In the process that reports: count what another one has tried, unless that died."""
    add_tallies(node.config.stash, getattr(node, "workeroutput", {}).get("tallies", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many faults and edits were tried, if any."""
    tally, edits = config.stash.get(TALLY, Tally()), config.stash.get(EDIT_TALLY, EditTally())
    if tally.points:
        terminalreporter.write_line(str(tally))
    if edits.edits:
        terminalreporter.write_line(str(edits))
