"""The report shows what the registry holds, names what is missing, and reads without script, network or colour."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from governance.errors import InputError, PlanError
from governance.evaluation import EvaluationRequest, evaluate
from governance.event_log import LogQuery, audit_log
from governance.identification import run_identification
from governance.lineages import create_lineage
from governance.measuring import GenerationSettings
from governance.patch_records import list_patches, show_patch
from governance.patching import apply_patch, revert_patch
from governance.placement import ON_THE_CPU, Placement
from governance.planning import plan_patch
from governance.prompt_sets import PromptSource
from governance.report_data import gather
from governance.report_figures import Control, Stage, StageFigures
from governance.reporting import write_report
from governance.workspace import Workspace
from registry import queries
from registry.errors import RecordNotFoundError
from registry.head_lines import Head
from registry.schema import Approval
from tests.governance.conftest import Trios
from tests.governance.report_pages import Page, read_page, require_readable
from tests.governance.scenarios import Scenario, build, settings_of

HOSTILE = "<script>alert('x')</script> & more"


def accuracy_prompts(place: Path) -> PromptSource:
    file = place / "task.jsonl"
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad", "water")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptSource(str(file), answer_column="response")


@pytest.fixture
def patched(scenario: Scenario, tmp_path: Path) -> Scenario:
    """Two patches, the second reverted; every stage measured; a control; a refused change."""
    workspace, task = scenario.workspace, accuracy_prompts(tmp_path)

    def measure(lineage: str, stage: str) -> None:
        evaluate(
            workspace,
            lineage,
            EvaluationRequest(
                model=stage, dimensions=("animals",), accuracy={"task_accuracy": task}, generation=GenerationSettings(3)
            ),
        )

    for stage in ("base", "aligned", "subject"):
        measure("line", stage)
    for dimension in ("animals", "weapons"):
        scenario.apply(dimension)
        measure("line", "head")
    create_lineage(workspace, "chance", subject="subject", aligned="aligned", base="base")
    found = run_identification(workspace, "chance", "animals", settings_of(score="random"))
    apply_patch(workspace, plan_patch(workspace, "chance", found.identification), reason="control")
    measure("chance", "head")
    revert_patch(workspace, "line", 2, reason=HOSTILE)
    with pytest.raises(PlanError):
        revert_patch(workspace, "line", 2)
    return scenario


@pytest.fixture
def page(patched: Scenario, tmp_path: Path) -> Page:
    return read_page(patched.workspace, "line", tmp_path)


def test_patch_table_holds_the_figures_of_patch_list(patched: Scenario, page: Page) -> None:
    shown = page.tables["table-patches"][1:]
    assert len(shown) == 2
    for row, patch in zip(shown, list_patches(patched.workspace, "line"), strict=True):
        assert row[:8] == [
            str(patch.patch),
            patch.dimension,
            patch.state,
            f"{patch.neurons_selected:,}",
            f"{patch.neurons_already_protected:,}",
            f"{patch.neurons_modified:,}",
            f"{100 * patch.modified_share:.2f} %",
            f"{100 * patch.modified_linear_share:.2f} %",
        ]
        for digest in (patch.digest_before, patch.digest_after, patch.artifact):
            assert digest is not None
            assert digest in page.source


def test_figures_are_those_of_evaluate(patched: Scenario, page: Page, tmp_path: Path) -> None:
    """Measured once more, the head and the subject give what the tables show."""
    task = accuracy_prompts(tmp_path)
    for stage, label in (("subject", "subject"), ("head", "after patch 1")):
        request = EvaluationRequest(
            model=stage, dimensions=("animals",), accuracy={"task_accuracy": task}, generation=GenerationSettings(3)
        )
        harm, accuracy = evaluate(patched.workspace, "line", request)
        for table, figure in (("table-harmfulness", harm), ("table-accuracy", accuracy)):
            assert page.row(table, label)[2] == (
                f"{figure.value:.1f}|{figure.interval_low:.1f} to {figure.interval_high:.1f}; "
                f"{figure.numerator} of {figure.n}"
            )
    again = read_page(patched.workspace, "line", tmp_path)
    assert again.tables["table-harmfulness"] == page.tables["table-harmfulness"]
    assert "2 earlier figures of the same states" in again.text


def test_stages_are_named_and_their_shares_add_up(patched: Scenario, page: Page) -> None:
    first, second = list_patches(patched.workspace, "line")
    own = [row[:2] for row in page.tables["table-harmfulness"][1:6]]
    both = 100 * (first.modified_share + second.modified_share)
    assert own == [
        ["base", "–not applicable"],
        ["aligned", "–not applicable"],
        ["subject", "–not applicable"],
        ["after patch 1 (head now)|animals", f"{100 * first.modified_share:.2f} %"],
        ["after patch 2 (reverted since)|weapons", f"{both:.2f} %"],
    ]


def test_judge_is_named_and_told_apart_from_a_trained_one(page: Page) -> None:
    assert "advbench-phrases 1" in page.tables["table-harmfulness"][0][2]
    assert "is not a trained judge" in page.text
    assert "not a compliance determination" in page.text


def test_lineage_with_random_neurons_on_the_same_subject_is_the_control(patched: Scenario, page: Page) -> None:
    (control,) = list_patches(patched.workspace, "chance")
    assert page.row("table-harmfulness", "Control: random neurons")[0].endswith("(lineage chance)")
    assert page.tables["table-harmfulness"][7][1] == f"{100 * control.modified_share:.2f} %"
    assert page.tables["table-control-1"][1][3] == f"{control.neurons_selected:,}"


def test_lineage_with_chosen_neurons_is_no_control(patched: Scenario, tmp_path: Path) -> None:
    found = read_page(patched.workspace, "chance", tmp_path)
    assert "This lineage is a control" in found.text
    assert "Control: random neurons" not in found.text


@pytest.mark.parametrize(
    ("shares", "same"), [((0.1, 0.2), True), ((0.099, 0.2), True), ((0.1, 0.3), False), ((), False)]
)
def test_control_is_said_to_have_the_same_share_only_if_it_has(shares: tuple[float, ...], same: bool) -> None:
    def rows(values: tuple[float, ...]) -> tuple[StageFigures, ...]:
        stages = [Stage("after", "", number, "a", share, False, False) for number, share in enumerate(values, 1)]
        return tuple(StageFigures(stage, ()) for stage in stages)

    assert Control("chance", rows(shares)).same_share(rows((0.1, 0.2))) is same


def test_overlap_names_the_protecting_dimension(patched: Scenario, page: Page) -> None:
    _, second = list_patches(patched.workspace, "line")
    row = page.row("table-overlap", "weapons")
    assert second.neurons_already_protected > 0
    share = 100 * second.neurons_already_protected / second.neurons_selected
    assert row[1] == f"{second.neurons_selected:,}"
    assert row[3] == f"animals {second.neurons_already_protected:,} ({share:.1f} %)"
    assert row[4].split("|")[0] == f"{second.neurons_already_protected:,}"
    assert row[5].split("|")[0] == f"{second.neurons_modified:,}"


def test_map_counts_the_claims(patched: Scenario) -> None:
    report = gather(patched.workspace, "line")
    claims = patched.claims()
    cells = {(block, cell.kind): cell for block, row in report.protection.blocks for cell in row}
    assert report.protection.protected == sum(len(rows) for rows in claims.values())
    for module, rows in claims.items():
        block, kind = int(module.split(".")[2]), module.split(".")[-1]
        assert cells[block, kind].protected == len(rows)
        assert [part.dimension for part in cells[block, kind].parts] == ["animals"]
        assert cells[block, kind].share <= report.protection.scale


def test_modules_of_every_patch_are_those_of_patch_show(patched: Scenario, page: Page) -> None:
    for number in (1, 2):
        _, changes = show_patch(patched.workspace, "line", number)
        shown = page.tables[f"table-modules-{number}"][1:]
        assert [(row[0], row[1], row[2]) for row in shown] == [
            (change.module, f"{change.rows:,}", f"{change.rows_unchanged:,}") for change in changes
        ]


def test_text_of_the_registry_is_escaped(page: Page) -> None:
    assert "<script" not in page.source
    assert "&lt;script&gt;" in page.source


def test_refused_change_is_listed(page: Page) -> None:
    (row,) = [row for row in page.tables["table-timeline"] if row[1].startswith("refused")]
    assert row[1] == "refused: patch revert"
    assert row[4].startswith("PlanError: ")


def test_ledger_proof_is_that_of_the_registry(patched: Scenario, page: Page) -> None:
    exported = patched.workspace.registry.heads.path.read_text(encoding="utf-8").splitlines()[-1]
    assert exported.replace('"', "&#34;") in page.source
    assert json.loads(exported)["hash"] in page.text
    assert "verified" in page.text
    assert "not verified" not in page.text


def test_broken_ledger_is_shown_as_not_verified(patched: Scenario, tmp_path: Path) -> None:
    last = patched.workspace.registry.heads.path.read_text(encoding="utf-8").splitlines()[-1]
    with patched.workspace.registry.heads.path.open("a", encoding="utf-8") as heads:
        after = json.loads(last)["count"]
        heads.write(Head(9999, "0" * 64, "2030-01-01T00:00:00.000000Z", after).line() + "\n")
    found = read_page(patched.workspace, "line", tmp_path)
    assert "not verified: 1 finding" in found.text
    assert "its end is cut off" in found.text
    assert "It is not the head of this ledger" in found.text


def test_changed_weights_are_shown_as_not_verified(patched: Scenario, tmp_path: Path) -> None:
    weights = next(patched.working.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert "not verified" in read_page(patched.workspace, "line", tmp_path).text


def test_lineage_without_anything_says_what_is_missing(scenario: Scenario, tmp_path: Path) -> None:
    found = read_page(scenario.workspace, "line", tmp_path)
    for sentence in (
        "Harmfulness was not measured for this lineage",
        "Neither accuracy nor over-refusal was measured",
        "No patch is recorded",
        "No neuron is protected at present",
        "No identification is recorded",
        "No refused change of this lineage is recorded",
        "No control with random neurons is recorded",
    ):
        assert sentence in found.text


def test_page_of_a_registry_can_be_read_without_seeing_it_and_loads_nothing(page: Page) -> None:
    require_readable(page)


def test_everything_of_the_registry_appears(patched: Scenario, page: Page) -> None:
    with patched.workspace.registry.read() as session:
        lineage = queries.get_lineage(session, "line")
        for module in queries.modules(session, lineage.subject_id):
            assert module.kind in page.tables["table-map"][0]
            assert page.row("table-map", str(module.block))
        for patch in queries.list_patches(session, lineage.id):
            assert page.row("table-patches", str(patch.sequence))[1] == patch.dimension.name
            assert f"{patch.sequence}|{patch.dimension.name}" in [row[2] for row in page.tables["table-timeline"]]
            changed = [row[0] for row in page.tables[f"table-modules-{patch.sequence}"][1:]]
            assert changed == [record.module.name for record in patch.modules]
            assert page.row("table-glance", patch.dimension.name)
        for dimension in ("animals", "weapons"):
            for held in queries.get_dimension(session, dimension).prompt_sets:
                assert held.digest in page.text
                assert held.rows == int(page.row("table-prompt-sets", str(held.id))[5])


def test_place_on_the_disk_is_not_handed_on(page: Page, tmp_path: Path) -> None:
    assert str(tmp_path) not in page.source
    assert "/tmp" not in page.source


def test_unknown_lineage_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    with pytest.raises(RecordNotFoundError):
        write_report(scenario.workspace, "nobody", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_place_that_cannot_be_written_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        write_report(scenario.workspace, "line", tmp_path / "file" / "report.html")


def test_date_of_generation_is_the_clock_of_the_workspace(scenario: Scenario, tmp_path: Path) -> None:
    still = Workspace(scenario.workspace.registry, "tester", clock=lambda: datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC))
    first = write_report(still, "line", tmp_path / "one.html").read_bytes()
    assert b"2031-02-03" in first
    assert write_report(still, "line", tmp_path / "two.html").read_bytes() == first


def test_timeline_says_who_did_what_why_and_which_event_tells_so(patched: Scenario, page: Page) -> None:
    events = {event.action: event.sequence for event in audit_log(patched.workspace, LogQuery(subject="line"))}
    shown = [row[1:] for row in page.tables["table-timeline"][1:]]
    assert [row[0] for row in shown] == ["lineage created", "applied", "applied", "reverted", "refused: patch revert"]
    assert shown[2] == ["applied", "2|weapons", "tester", "because of weapons", str(events["patch.applied"])]
    assert shown[3] == ["reverted", "2|weapons", "tester", HOSTILE, str(events["patch.reverted"])]
    assert shown[4][4] == str(events["refused"])


def test_a_decision_on_a_patch_is_shown(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    with scenario.workspace.registry.write() as session:
        lineage = queries.get_lineage(session, "line")
        patch = queries.get_patch(session, lineage, 1)
        session.add(Approval(patch_id=patch.id, actor="boss", decision="refused", reason="too much"))
    page = read_page(scenario.workspace, "line", tmp_path)
    (row,) = page.tables["table-approvals"][1:]
    assert row[:3] == ["1|animals", "refused", "boss"]
    assert row[4] == "too much"
    assert "refused by decision" in [row[1] for row in page.tables["table-timeline"]]


def test_the_map_counts_neurons_that_another_dimension_selected_too(patched: Scenario) -> None:
    """Of what animals' patch holds, weapons' identification selected what its patch could not have."""
    _, second = list_patches(patched.workspace, "line")
    found = gather(patched.workspace, "line").protection
    assert found.shared == second.neurons_already_protected > 0
    assert found.left == found.neurons - found.protected
    assert found.by_dimension == (("animals", found.protected),)


def test_figures_in_another_number_format_stand_in_columns_of_their_own(scenario: Scenario, tmp_path: Path) -> None:
    for placement in (ON_THE_CPU, Placement("cpu", "bfloat16")):
        evaluate(
            replace(scenario.workspace, placement=placement),
            "line",
            EvaluationRequest(dimensions=("animals",), generation=GenerationSettings(2)),
        )
    page = read_page(scenario.workspace, "line", tmp_path)
    assert "animals (bfloat16)" in page.text
    assert "in bfloat16" in page.text


def test_a_lineage_takes_the_subjects_figures_from_one_that_measured_it_the_same_way(
    patched: Scenario, page: Page, tmp_path: Path
) -> None:
    other = read_page(patched.workspace, "chance", tmp_path)
    assert other.row("table-harmfulness", "subject") == page.row("table-harmfulness", "subject")
    assert "in lineage line" in other.text
    assert "The subject itself was measured" not in page.text
    request = EvaluationRequest(dimensions=("animals",), generation=GenerationSettings(2))
    evaluate(patched.workspace, "chance", request)
    longer = read_page(patched.workspace, "chance", tmp_path)
    assert longer.row("table-harmfulness", "subject") == page.row("table-harmfulness", "subject")


def test_a_report_is_read_from_both_databases(
    workspace: Workspace, trios: Trios, prompts: Path, tmp_path: Path
) -> None:
    scenario = build(workspace, trios(), prompts)
    first, second = scenario.apply("animals"), scenario.apply("weapons")
    page = read_page(workspace, "line", tmp_path)
    require_readable(page)
    found = gather(workspace, "line").protection
    assert found.protected == first.neurons_modified + second.neurons_modified
    assert found.shared >= second.neurons_already_protected > 0
    assert page.tables["table-map"][-1][-1] == f"{found.left:,}"
    assert [row[1] for row in page.tables["table-timeline"][1:]] == ["lineage created", "applied", "applied"]
