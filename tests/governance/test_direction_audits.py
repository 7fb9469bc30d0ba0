"""Explaining, rebuilding, asking, exporting and importing where patches claim directions and write rows in turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import main
from governance.capacity import capacity
from governance.errors import PlanError
from governance.explanation import explain
from governance.neuron_history import neuron_history
from governance.overlap import overlaps
from governance.pack_export import export_pack
from governance.pack_verification import verify_pack_file
from governance.patch_import import import_patch
from governance.proof_checks import Evidence
from governance.replay import replay
from governance.reporting import write_report
from governance.state_diff import diff_states
from registry import queries
from registry.schema import Identification, IdentifiedNeuron
from tests.governance.conftest import Scenarios, Trios
from tests.governance.exchange import export_to, require_refused
from tests.governance.scenarios import Scenario, digests
from tests.governance.test_directions import DIRECTIONS, FULL, LORA

FORMS = ["bfloat16 in shards", "transposed bfloat16", "adapter on the aligned model", "bfloat16 adapter"]


def lineage_of(form: str, scenarios: Scenarios, trios: Trios, adapter_trios: Trios) -> Scenario:
    """A lineage of a form of subject."""
    return scenarios(trios(**FULL[form]) if form in FULL else adapter_trios(**LORA[form]))


@pytest.fixture(params=FORMS)
def lineage(request: pytest.FixtureRequest, scenarios: Scenarios, trios: Trios, adapter_trios: Trios) -> Scenario:
    """Neurons protected by patch 1, directions by 2, neurons in the same modules by 3."""
    made = lineage_of(request.param, scenarios, trios, adapter_trios)
    made.apply("weapons", budget=0.1)
    made.apply("animals", **DIRECTIONS)
    made.apply("insults", score="random", budget=0.15)
    return made


def run(scenario: Scenario, *arguments: str) -> Result:
    """Run a command on a scenario's registry."""
    return CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])


def test_a_row_that_patches_wrote_in_turn_is_the_last_ones_and_the_others_are_told(lineage: Scenario) -> None:
    outcome = explain(lineage.workspace, "line")
    assert outcome.findings == ()
    assert outcome.rows_changed == outcome.rows_attributed > 0
    written = {number: lineage.artifact_rows(number) for number in (1, 2, 3)}
    shared = sum(len(rows & written[2].get(module, set())) for module, rows in written[3].items())
    assert [(turn.patches, turn.rows) for turn in outcome.written_in_turn] == [((2, 3), shared)]
    by_number = {patch.patch: patch for patch in outcome.patches}
    assert by_number[2].rewritten == shared
    assert by_number[2].rows == sum(map(len, written[2].values())) - shared
    assert by_number[2].directions == sum(ranks[2] for ranks in lineage.direction_ranks().values())
    assert by_number[3].rows == by_number[3].as_written == sum(map(len, written[3].values()))
    shown = run(lineage, "audit", "explain", "line")
    assert shown.exit_code == 0
    assert f"{shared:,} rows were written by patch 3 on what patch 2 had written." in shown.output


def test_the_head_is_rebuilt_from_rows_written_in_turn(lineage: Scenario, tmp_path: Path) -> None:
    outcome = replay(lineage.workspace, "line", tmp_path / "rebuilt")
    assert outcome.agrees
    assert len(outcome.states) == 7
    assert digests(tmp_path / "rebuilt") == digests(lineage.working)


def test_without_their_claim_the_rows_of_a_direction_patch_are_unexplained(scenario: Scenario) -> None:
    scenario.apply("weapons", **DIRECTIONS)
    with scenario.workspace.registry.engine.execution_options(neuronledger_mode="write").begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER protected_directions_no_release")
        connection.exec_driver_sql("DELETE FROM protected_directions")
    kinds = {finding.kind for finding in explain(scenario.workspace, "line").findings}
    assert kinds == {"unclaimed", "claim"}


def test_questions_tell_directions_that_are_left_and_patches_that_wrote_a_row(lineage: Scenario) -> None:
    counted = {row.module: row for row in capacity(lineage.workspace, "line")}
    for module, ranks in lineage.direction_ranks().items():
        row = counted[module]
        assert (row.directions_protected, row.directions_unprotected) == (ranks[2], row.directions - ranks[2])
    module, rows = next(iter(lineage.artifact_rows(3).items()))
    neuron = min(rows & lineage.artifact_rows(2)[module])
    what = [(entry.what, entry.patch) for entry in neuron_history(lineage.workspace, "line", module, neuron).history]
    assert ("written", 2) in what
    assert ("claimed", 3) in what
    protected = next(iter(next(iter(lineage.claims().values()))))
    told = neuron_history(lineage.workspace, "line", next(iter(lineage.claims())), protected)
    assert told.protected
    assert overlaps(lineage.workspace, "line")
    difference = diff_states(lineage.workspace, "line", "1", "2")
    assert (difference.neurons_added, difference.neurons_removed) == (0, 0)
    assert [(patch.patch, patch.neurons) for patch in difference.applied] == [(2, 0)]
    assert difference.applied[0].rows == sum(map(len, lineage.artifact_rows(2).values()))
    for command in (
        ("audit", "capacity", "line"),
        ("audit", "diff", "line", "1", "2"),
        ("audit", "neuron", "line", module, str(neuron)),
        ("patch", "show", "line", "2"),
        ("patch", "list", "line"),
        ("lineage", "list"),
    ):
        shown = run(lineage, *command)
        assert shown.exit_code == 0, shown.output


def test_exported_patches_are_imported_in_their_order_and_claim_directions_there(
    lineage: Scenario, scenarios: Scenarios, tmp_path: Path
) -> None:
    files = {number: export_to(lineage, tmp_path / f"{number}.patch", number) for number in (1, 2, 3)}
    there = scenarios(lineage.trio)
    require_refused(there, files[3], PlanError, "patches that claim directions wrote it there or here")
    for number in (1, 2):
        import_patch(there.workspace, "line", files[number])
        there.require_sound()
    assert there.direction_ranks() == {m: {2: r[2]} for m, r in lineage.direction_ranks().items()}
    import_patch(there.workspace, "line", files[3])
    assert digests(there.working) == digests(lineage.working)
    there.require_sound()
    assert explain(there.workspace, "line").explained
    for _ in range(3):
        there.revert()
    assert digests(there.working) == digests(there.trio.subject)


def test_an_imported_patch_that_would_act_on_claimed_directions_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    """Its rows are the subject's here too, but directions have been claimed since it was made without them."""
    scenario.apply("weapons", budget=0.1)
    file = export_to(scenario, tmp_path / "rows.patch", 1)
    scenario.apply("animals", **DIRECTIONS)
    directed = export_to(scenario, tmp_path / "directions.patch", 2)
    scenario.revert(1)
    require_refused(scenario, file, PlanError, "act otherwise on the directions that patch 2 claims")
    require_refused(scenario, directed, PlanError, "Import it where the same patches are applied")


def test_an_evidence_pack_holds_and_checks_claims_on_directions(lineage: Scenario, tmp_path: Path) -> None:
    export_pack(lineage.workspace, "line", tmp_path / "line.pack", artifacts=True)
    outcome = verify_pack_file(tmp_path / "line.pack", Evidence())
    assert outcome.findings == ()
    directions = sum(ranks[2] for ranks in lineage.direction_ranks().values())
    assert outcome.checked["protected directions"] == directions


def test_protecting_directions_from_the_command_line(scenario: Scenario) -> None:
    chosen = ["--set", "protect=directions", "--set", "operation=subspace", "--set", "layers=all"]
    planned = run(scenario, "patch", "plan", "line", "weapons", *chosen, "--set", "directions=2")
    assert planned.exit_code == 0, planned.output
    assert "input directions to protect in 14 modules" in planned.output
    applied = run(scenario, "patch", "apply", "line", "weapons", *chosen, "--set", "directions=2", "--json")
    assert applied.exit_code == 0, applied.output
    told: dict[str, Any] = json.loads(applied.output)
    assert (told["directions"], told["neurons_modified"]) == (28, 0)
    assert "28 input directions protected" in run(scenario, "patch", "show", "line", "1").output
    again = run(scenario, "patch", "apply", "line", "animals", "--set", "budget=0.1", "--set", "stop_at=0")
    assert again.exit_code == 0, again.output
    refused = run(scenario, "patch", "revert", "line", "1")
    assert refused.exit_code == 2
    assert "revert patch 2 first" in refused.output.lower()
    assert run(scenario, "audit", "verify", "--weights").exit_code == 0
    for _ in range(2):
        assert run(scenario, "patch", "revert", "line").exit_code == 0
    assert digests(scenario.working) == digests(scenario.trio.subject)
    wrong = run(
        scenario, "patch", "plan", "line", "weapons", "--set", "protect=directions", "--set", "operation=restore"
    )
    assert wrong.exit_code == 2


def test_a_direction_identification_records_ranks_and_no_neurons(scenario: Scenario) -> None:
    found = scenario.identify("weapons", **DIRECTIONS)
    with scenario.workspace.registry.read() as session:
        assert session.query(IdentifiedNeuron).count() == 0
        record = session.get_one(Identification, found.identification)
        assert {entry["directions"] for entry in record.summary["found"]["modules"]} == {3}
        assert queries.get_lineage(session, "line").head is None


def test_the_report_tells_of_protected_directions(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("weapons", **DIRECTIONS)
    page = write_report(scenario.workspace, "line", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Protected input directions: patch 1 (weapons) 42 in 14 modules." in page
