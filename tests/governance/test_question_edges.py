"""Questions where something failed, is missing or was tampered with: the answer says so, or they are refused."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from governance.capacity import capacity
from governance.errors import InputError
from governance.event_log import LogQuery, audit_log
from governance.moments import parse_moment
from governance.neuron_history import neuron_history
from governance.overlap import overlaps
from governance.state_diff import diff_states
from governance.timeline import lineages_at
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry.database import Registry
from registry.errors import LedgerError, RecordNotFoundError
from registry.schema import IdentifiedNeuron, PatchModule
from tests.governance.conftest import Scenarios, Trios
from tests.governance.patched_lineages import change_records
from tests.governance.scenarios import Scenario, Trio
from tests.registry.records import DIGEST, add_lineage, add_patch

UP = "model.layers.0.mlp.up_proj"


class TestMoments:
    @pytest.mark.parametrize(
        ("text", "begin", "end"),
        [
            ("2026-03-01", "2026-03-01T00:00:00.000000Z", "2026-03-01T23:59:59.999999Z"),
            ("20260301", "2026-03-01T00:00:00.000000Z", "2026-03-01T23:59:59.999999Z"),
            ("2026-03-01T12", "2026-03-01T12:00:00.000000Z", "2026-03-01T12:59:59.999999Z"),
            ("2026-03-01 12:30", "2026-03-01T12:30:00.000000Z", "2026-03-01T12:30:59.999999Z"),
            ("20260301T1230", "2026-03-01T12:30:00.000000Z", "2026-03-01T12:30:59.999999Z"),
            (" 2026-03-01T12:30:05Z ", "2026-03-01T12:30:05.000000Z", "2026-03-01T12:30:05.999999Z"),
            ("2026-03-01T12:30:05+05:30", "2026-03-01T07:00:05.000000Z", "2026-03-01T07:00:05.999999Z"),
            ("2026-03-01T00:30-01:00", "2026-03-01T01:30:00.000000Z", "2026-03-01T01:30:59.999999Z"),
            ("2026-03-01T12:30:05.5", "2026-03-01T12:30:05.500000Z", "2026-03-01T12:30:05.500000Z"),
            ("9999-12-31", "9999-12-31T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z"),
        ],
    )
    def test_what_is_named_covers_its_span(self, text: str, begin: str, end: str) -> None:
        moment = parse_moment(text)
        assert (moment.first, moment.last) == (begin, end)

    @pytest.mark.parametrize("text", ["", "yesterday", "12:30", "2026-13-01", "2026-02-30", "9999-12-31T23:00-05:00"])
    def test_what_is_no_time_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(InputError, match="Give a date \\(2026-03-01\\)"):
            parse_moment(text)

    @given(st.integers(0, 10**17), st.integers(10, 32))
    def test_a_moment_holds_the_time_that_it_was_cut_from(self, microseconds: int, length: int) -> None:
        """Any beginning of a written time that is one itself covers the time."""
        moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
        written = moment.isoformat(timespec="microseconds").replace("+00:00", "")[:length]
        try:
            named = parse_moment(written)
        except InputError:
            return
        if "." not in written:
            assert named.begin <= moment <= named.end
        assert named.end - named.begin <= timedelta(days=1)


@pytest.fixture
def workspace(registry: Registry) -> Workspace:
    """A lineage without files, on both databases: patch 1 was taken back, 2 is applied, 3 was interrupted."""
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    workspace = Workspace(registry=registry, actor="ada", clock=lambda: now)
    with registry.write() as session:
        lineage = add_lineage(session, "line")
        workspace.record(session, "lineage.created", "lineage", "line", {"state_digest": DIGEST})
        for number, state, last in (
            (1, "rejected", "patch.undone"),
            (2, "applied", "patch.applied"),
            (3, "applying", ""),
        ):
            now += timedelta(days=1)
            patch = add_patch(session, lineage, sequence=number, state=state)  # type: ignore[arg-type]
            patch.created_at, patch.failure = now, "the disk is full" if number == 1 else None
            patch.applied_at = now if number == 2 else None
            patch.neurons_modified = 1
            session.add(PatchModule(patch_id=patch.id, module_id=1, rows=1, parameters=4))
            session.add(
                IdentifiedNeuron(
                    identification_id=patch.identification_id, module_id=1, neuron=number, disposition="selected"
                )
            )
            workspace.record(session, "patch.applying", "lineage", "line", {"patch": number})
            if last:
                workspace.record(session, last, "lineage", "line", {"patch": number, "digest_after": DIGEST[::-1]})
    return workspace


def test_a_patch_that_was_taken_back_is_told_with_its_failure(workspace: Workspace) -> None:
    found = neuron_history(workspace, "line", UP, 1)
    assert [(entry.what, entry.reason) for entry in found.history if entry.patch] == [
        ("taken back", "the disk is full")
    ]
    assert not found.protected


def test_a_patch_that_is_at_work_is_told(workspace: Workspace) -> None:
    assert [entry.what for entry in neuron_history(workspace, "line", UP, 3).history if entry.patch] == [
        "being applied"
    ]
    (during,) = lineages_at(workspace, "2026-03-04")
    (before,) = lineages_at(workspace, "2026-03-03")
    assert (during.at_work, during.patches, during.since[:10]) == (3, (2,), "2026-03-03")
    assert (before.at_work, before.patches) == (None, (2,))


def test_a_patch_that_was_never_applied_is_no_state(workspace: Workspace) -> None:
    with pytest.raises(RecordNotFoundError, match=r"patch 1 .* was never applied\. Its states are subject, 2 .*, head"):
        diff_states(workspace, "line", "1", "head")


def test_without_its_artifact_a_claim_is_told_without_bytes(workspace: Workspace) -> None:
    (entry,) = (entry for entry in neuron_history(workspace, "line", UP, 2).history if entry.patch == 2)
    assert (entry.what, entry.sha256_before, entry.norm_after) == ("claimed", None, None)
    assert entry.note


def test_a_clock_that_was_set_back_does_not_lose_a_patch(registry: Registry) -> None:
    times = iter(datetime(2026, 3, day, tzinfo=UTC) for day in (1, 5, 3))
    workspace = Workspace(registry=registry, actor="ada", clock=lambda: next(times))
    with registry.write() as session:
        add_lineage(session, "line")
        workspace.record(session, "lineage.created", "lineage", "line", {"state_digest": DIGEST})
        for number in (1, 2):
            workspace.record(session, "patch.applied", "lineage", "line", {"patch": number, "digest_after": DIGEST})
    heads = [lineages_at(workspace, f"2026-03-0{day}")[0].patches for day in (2, 3, 4, 5)]
    assert heads == [(), (1, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("payload", ["{}", "[]", "not json", '{"patch":"one"}', '{"patch": 1}'])
def test_an_event_that_does_not_say_what_it_should_stops_the_question(scenario: Scenario, payload: str) -> None:
    scenario.apply("animals")
    change_records(scenario, f"UPDATE ledger_events SET payload = '{payload}' WHERE action = 'patch.applied'")
    for ask in (
        lambda: lineages_at(scenario.workspace, "2030-01-01"),
        lambda: diff_states(scenario.workspace, "line", "subject", "head"),
    ):
        with pytest.raises(LedgerError, match=r"event \d+ \(patch.applied\).*Run neuronledger audit verify"):
            ask()


def test_a_damaged_payload_does_not_stop_the_log_or_the_view(scenario: Scenario) -> None:
    scenario.apply("animals")
    change_records(scenario, "UPDATE ledger_events SET payload = 'not json' WHERE action = 'patch.applied'")
    events = audit_log(scenario.workspace, LogQuery(lineage="line"))
    assert events[-1].payload == {}
    audit_log(scenario.workspace, LogQuery(dimension="animals"))
    with scenario.workspace.registry.read() as session:
        assert session.execute(text("SELECT patch FROM v_events ORDER BY event DESC")).first() == (None,)


def test_without_the_event_of_its_creation_a_lineage_has_no_past(registry: Registry) -> None:
    with registry.write() as session:
        add_lineage(session, "line")
    with pytest.raises(LedgerError, match="creation of lineage line"):
        lineages_at(Workspace(registry=registry, actor="ada"), "2030-01-01")


@pytest.fixture(params=["full checkpoint", "adapter"])
def either_form(request: pytest.FixtureRequest, scenarios: Scenarios) -> Scenario:
    """A lineage of either form of subject."""
    trio: Trio = (
        request.getfixturevalue("trios")()
        if request.param == "full checkpoint"
        else request.getfixturevalue("adapter_trios")(on_aligned=False)
    )
    return scenarios(trio)


def test_what_a_patch_claims_is_what_its_identification_selected_and_found_free(either_form: Scenario) -> None:
    """What the history and the view of it rest on, without reading artifacts."""
    scenario = either_form
    for settings in (
        {"dimension": "weapons", "budget": 0.3},
        {"dimension": "animals", "score": "random", "seed": 1, "budget": 0.2},
        {"dimension": "insults", "method": "nlsr"},
    ):
        scenario.apply(**settings)  # type: ignore[arg-type]
    scenario.revert(2)
    with scenario.workspace.registry.read() as session:
        rows = session.execute(
            text("SELECT patch, module, neuron FROM v_neuron_history WHERE what = 'claimed' AND lineage = 'line'")
        )
        told: dict[int, dict[str, set[int]]] = {}
        for patch, module, neuron in rows:
            told.setdefault(patch, {}).setdefault(module, set()).add(neuron)
    assert told == {sequence: scenario.artifact_rows(sequence) for sequence in (1, 2, 3)}


def test_a_patch_of_whole_factors_claims_what_was_recorded_of_it(scenarios: Scenarios, continued: Trios) -> None:
    scenario = scenarios(continued(same_basis=True))
    scenario.apply("animals", method="nlsr", form="factor")
    with scenario.workspace.registry.read() as session:
        claimed = session.execute(text("SELECT module, neuron FROM v_neuron_history WHERE what = 'claimed'")).all()
    held = scenario.artifact_rows(1)
    assert {(module, neuron) for module, neuron in claimed} == {(name, row) for name in held for row in held[name]}


def test_of_an_adapter_the_row_of_lora_b_is_told(lora_scenario: Scenario) -> None:
    lora_scenario.apply("animals")
    module, held = next(iter(lora_scenario.claims().items()))
    neuron = next(iter(held))
    entry = neuron_history(lora_scenario.workspace, "line", module, neuron).history[-1]
    subject: Any = lora_scenario.subject_weights()
    before = subject.adapter.factors(module)[1][neuron]
    assert entry.norm_before == pytest.approx(float(before.double().norm()))
    assert entry.sha256_before != entry.sha256_after


def test_an_empty_lineage_answers_every_question(scenario: Scenario) -> None:
    workspace = scenario.workspace
    assert overlaps(workspace, "line") == []
    assert {row.protected for row in capacity(workspace, "line")} == {0}
    assert neuron_history(workspace, "line", "0.mlp.up_proj", 0).history == ()
    found = diff_states(workspace, "line", "subject", "head")
    assert (found.modules, found.applied, found.same_weights) == ((), (), True)
    for ask in (capacity, overlaps):
        with pytest.raises(NeuronLedgerError, match="Did you mean line"):
            ask(workspace, "lime")
