"""Whatever is applied and reverted in whatever order: the working checkpoint is the subject but for claimed rows."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algorithms.weights import AdapterWeights
from governance.workspace import Workspace
from registry.database import Registry
from tests.databases import SQLiteDatabases
from tests.governance.conftest import Trios
from tests.governance.scenarios import (
    HARMFUL,
    Scenario,
    build,
    digests,
    require_factors_kept,
    require_only_rows_differ,
)

FORMS: dict[str, dict[str, Any]] = {
    "restore": {"operation": "restore"},
    "subspace": {"operation": "subspace", "directions": 2},
    "project": {"operation": "project", "budget": 0.15},
    "complement": {"operation": "complement", "score": "random"},
}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.sampled_from(sorted(HARMFUL)), st.sampled_from(sorted(FORMS))),
        st.tuples(st.just("revert"), st.integers(0, 5), st.just("")),
    ),
    min_size=3,
    max_size=6,
)


def _walk(scenario: Scenario, steps: list[tuple[str, Any, str]]) -> None:
    """Take the steps, checking after each, and at the end take back what is left."""
    applied: list[int] = []
    for action, what, form in steps:
        kept = scenario.claimed_rows()
        if action == "apply":
            applied.append(scenario.apply(what, **FORMS[form]).patch)
        elif applied:
            scenario.revert(applied.pop(what % len(applied)))
        _require_consistent(scenario, applied)
        now = scenario.claimed_rows()
        assert all(now[neuron] == kept[neuron] for neuron in now.keys() & kept.keys())
        assert action == "revert" or now.keys() >= kept.keys()
    while applied:
        scenario.revert(applied.pop())
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


def _require_consistent(scenario: Scenario, applied: list[int]) -> None:
    claimed = scenario.claims()
    expected: dict[str, dict[int, int]] = {}
    for sequence in applied:
        for module, rows in scenario.artifact_rows(sequence).items():
            assert not rows & expected.get(module, {}).keys()
            expected.setdefault(module, {}).update(dict.fromkeys(rows, sequence))
    assert claimed == expected
    if isinstance(scenario.weights(), AdapterWeights):
        require_factors_kept(scenario.trio.subject, scenario.working, claimed)
    else:
        require_only_rows_differ(scenario.trio.subject, scenario.working, claimed)


@pytest.fixture(scope="module")
def fresh(sqlite_databases: SQLiteDatabases, prompts: Path) -> Callable[[Path, Any], Scenario]:
    """Build a scenario in a directory."""

    def scenario(place: Path, trio: Any) -> Scenario:
        registry = Registry.open(sqlite_databases.migrated(place))
        return build(Workspace(registry=registry, actor="tester"), trio, prompts)

    return scenario


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_patches_on_a_full_checkpoint(
    fresh: Callable[[Path, Any], Scenario], trios: Trios, steps: list[tuple[str, Any, str]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        scenario = fresh(Path(place), trios())
        with scenario.workspace.registry:
            _walk(scenario, steps)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_patches_on_an_adapter(
    fresh: Callable[[Path, Any], Scenario], adapter_trios: Trios, steps: list[tuple[str, Any, str]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        scenario = fresh(Path(place), adapter_trios(on_aligned=False))
        with scenario.workspace.registry:
            _walk(scenario, steps)
