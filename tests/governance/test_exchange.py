"""Patches taken elsewhere: the very same artifact and weights arrive, and the record says where from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from sqlalchemy import text

from cli import main
from governance.auditing import verify
from governance.explanation import explain
from governance.lineages import create_lineage
from governance.patch_artifact import FORMAT as ARTIFACT
from governance.patch_file import PROVENANCE, PROVENANCE_DIGEST, open_patch_file
from governance.patch_import import dry_run_import, import_patch
from governance.patch_records import show_patch
from governance.provenance import Provenance
from governance.replay import replay
from governance.reporting import write_report
from governance.workspace import Workspace
from registry import queries
from registry.schema import Identification
from tests.governance.conftest import Scenarios, Trios
from tests.governance.exchange import export_to, sha256_of
from tests.governance.scenarios import (
    BENIGN,
    HARMFUL,
    Scenario,
    Trio,
    build,
    digests,
)

KINDS = pytest.mark.parametrize("kind", ["full", "sharded", "half", "transposed", "lora", "rslora"])


@pytest.fixture
def trio_of(trios: Trios, adapter_trios: Trios) -> Callable[[str], Trio]:
    """Subjects of every kind."""
    made: dict[str, Callable[[], Trio]] = {
        "full": trios,
        "sharded": lambda: trios(shard_size="10KB"),
        "half": lambda: trios(dtype=torch.bfloat16),
        "transposed": lambda: trios("gpt2"),
        "lora": lambda: adapter_trios(on_aligned=False),
        "rslora": lambda: adapter_trios(on_aligned=False, use_rslora=True, rank=6, alpha=7),
    }
    return lambda kind: made[kind]()


@KINDS
def test_a_patch_arrives_in_another_registry_with_the_very_same_bytes(
    workspace: Workspace,
    scenarios: Scenarios,
    trio_of: Callable[[str], Trio],
    prompts: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    """There and back, on both databases; what is exported again is the same artifact, and everything is taken back."""
    trio = trio_of(kind)
    source = build(workspace, trio, prompts)
    applied = source.apply("animals")
    file = export_to(source, tmp_path / "animals.patch")

    target = scenarios(trio)
    planned = dry_run_import(target.workspace, "line", file)
    assert target.states() == []
    summary = import_patch(target.workspace, "line", file, reason="from the other registry")
    assert (summary.state, summary.reason, summary.dimension) == ("applied", "from the other registry", "animals")
    assert planned.neurons_modified == summary.neurons_modified == applied.neurons_modified > 0
    assert (planned.rows_unchanged, planned.parameters_modified) == (
        applied.rows_unchanged,
        applied.parameters_modified,
    )
    assert (summary.artifact, summary.digest_after) == (applied.artifact, applied.digest_after)
    assert digests(target.working) == digests(source.working) != digests(trio.subject)
    assert target.claims() == source.claims()
    assert show_patch(target.workspace, "line", 1)[1] == show_patch(workspace, "line", 1)[1]
    target.require_sound()
    assert explain(target.workspace, "line").explained
    assert replay(target.workspace, "line").agrees

    again = export_to(target, tmp_path / "again.patch")
    assert open_patch_file(again).provenance.artifact == applied.artifact
    create_lineage(workspace, "twin", subject="subject", aligned="aligned", base="base")
    twin = Scenario(workspace, trio, "twin")
    back = import_patch(workspace, "twin", again)
    assert back.artifact == applied.artifact
    assert digests(twin.working) == digests(source.working)
    for scenario in (twin, target, source):
        scenario.revert()
        assert digests(scenario.working) == digests(trio.subject)
        assert scenario.claims() == {}
        scenario.require_sound()


def test_the_subject_may_lie_elsewhere_under_other_names(
    scenario: Scenario, sqlite_workspace: Workspace, exported: Path, prompts: Path, tmp_path: Path
) -> None:
    copied = Trio(
        *(
            Path(shutil.copytree(getattr(scenario.trio, role), tmp_path / role))
            for role in ("subject", "aligned", "base")
        )
    )
    target = build(sqlite_workspace, copied, prompts, "other")
    import_patch(sqlite_workspace, "other", exported)
    assert digests(target.working) == digests(scenario.working)
    target.require_sound()


def test_the_record_says_where_an_imported_patch_came_from(
    scenario: Scenario, target: Scenario, exported: Path
) -> None:
    import_patch(target.workspace, "line", exported)
    here, there = target.patch(1), scenario.patch(1)
    origin = open_patch_file(exported).provenance
    assert here.origin == origin.record()
    assert (origin.lineage, origin.patch, origin.artifact) == ("line", 1, there.artifact_digest)
    assert (origin.digest_before, origin.digest_after) == (there.digest_before, there.digest_after)
    assert (here.settings, here.kind) == (there.settings, "fgsn")
    with target.workspace.registry.read() as session:
        found = session.get_one(Identification, here.identification_id)
        assert found.artifact_digest is None
        assert (found.layer_scores, found.prompt_sets) == ([], [])
        assert found.summary["imported"] is True
        assert (found.settings_digest, found.seed, found.preset) == (
            origin.identification.settings_digest,
            origin.identification.seed,
            None,
        )
    events = dict(target.events())
    for action in ("patch.applying", "patch.applied"):
        assert events[action]["origin"] == {
            "lineage": "line",
            "patch": 1,
            "artifact": there.artifact_digest,
            "ledger_events": origin.ledger.events,
            "ledger_hash": origin.ledger.hash,
            "file_sha256": sha256_of(exported),
        }
    event = dict(scenario.events())["patch.exported"]
    assert (event["patch"], event["files"]) == (1, {exported.name: sha256_of(exported)})
    scenario.require_sound()
    summary, _ = show_patch(target.workspace, "line", 1)
    assert summary.origin is not None
    assert (summary.origin.lineage, summary.origin.patch, summary.origin.reason) == ("line", "1", "because of animals")
    assert show_patch(scenario.workspace, "line", 1)[0].origin is None


def test_provenance_follows_a_patch_through_two_imports(
    scenario: Scenario, target: Scenario, scenarios: Scenarios, exported: Path, tmp_path: Path
) -> None:
    import_patch(target.workspace, "line", exported)
    third = scenarios(scenario.trio)
    import_patch(third.workspace, "line", export_to(target, tmp_path / "second.patch"))
    origin = third.patch(1).origin
    assert origin is not None
    assert origin["origin"] == open_patch_file(exported).provenance.record()
    assert origin["identification"]["settings"] == scenario.patch(1).settings
    third.require_sound()


def test_a_patch_file_holds_rows_and_provenance_but_no_prompt_and_no_path(scenario: Scenario, exported: Path) -> None:
    content = exported.read_bytes()
    for prompt in (*HARMFUL["animals"], *BENIGN):
        assert prompt.encode() not in content
    assert str(scenario.working.parent.parent).encode() not in content
    assert str(scenario.trio.subject).encode() not in content
    told = open_patch_file(exported).provenance
    assert {held.purpose: held.rows for held in told.dimension.prompt_sets} == {
        "harmful": 3,
        "benign": 4,
        "heldout": 2,
    }
    assert told.dimension.description == "about animals"
    assert (told.subject.name, told.subject.architecture, told.actor, told.reason) == (
        "subject",
        "llama",
        "tester",
        "because of animals",
    )
    assert {"torch", "transformers"} <= told.identification.library_versions.keys()
    artifact = load_file(scenario.artifact(1))
    ours = load_file(exported)
    assert artifact.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in artifact.items())
    with safe_open(exported, framework="pt") as handle:
        assert set(handle.metadata()) == {ARTIFACT, PROVENANCE, PROVENANCE_DIGEST}


def test_a_reverted_patch_can_be_taken_elsewhere(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    patched = digests(scenario.working)
    scenario.revert()
    import_patch(target.workspace, "line", export_to(scenario, tmp_path / "reverted.patch"))
    assert digests(target.working) == patched
    target.require_sound()


def test_an_imported_patch_takes_its_place_among_others(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    """Before and after patches of the lineage's own, and taken back out of order."""
    scenario.apply("weapons")
    scenario.apply("animals", seed=5, budget=0.2)
    target.apply("weapons")
    alone = digests(target.working)
    kept = target.claimed_rows()
    import_patch(target.workspace, "line", export_to(scenario, tmp_path / "second.patch", 2))
    assert digests(target.working) == digests(scenario.working)
    assert kept.items() <= target.claimed_rows().items()
    target.apply("insults", budget=0.3)
    target.require_sound()
    target.revert(3)
    target.revert(2)
    assert digests(target.working) == alone
    target.revert(1)
    assert digests(target.working) == digests(target.trio.subject)
    target.require_sound()


def test_nothing_is_planned_from_an_imported_identification(target: Scenario, exported: Path) -> None:
    """The same settings at the same head: the run is made anew, and what the import protects stays protected."""
    imported = import_patch(target.workspace, "line", exported)
    target.revert()
    found = target.identify("animals")
    assert not found.reused
    assert found.identification != imported.identification
    import_patch(target.workspace, "line", exported)
    again = target.apply("animals")
    assert again.neurons_selected == again.neurons_already_protected == imported.neurons_modified
    target.require_sound()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE patches SET origin = NULL",
        "UPDATE patches SET origin = '{}'",
        "UPDATE patches SET origin = REPLACE(origin, 'tester', 'taster')",
    ],
)
def test_an_edited_origin_is_named(target: Scenario, exported: Path, statement: str) -> None:
    import_patch(target.workspace, "line", exported)
    with target.workspace.registry.write() as session:
        session.execute(text(statement))
    found = verify(target.workspace).findings
    assert {finding.subject for finding in found} == {"patch 1 of line"}
    assert found[-1].problem == "what its record says of where it came from is not what the ledger says"
    assert show_patch(target.workspace, "line", 1)[0].state == "applied"


def test_an_invented_origin_is_named(scenario: Scenario, exported: Path) -> None:
    with scenario.workspace.registry.write() as session:
        lineage = queries.get_lineage(session, "line")
        queries.get_patch(session, lineage, 1).origin = open_patch_file(exported).provenance.record()
    found = verify(scenario.workspace).findings
    assert {finding.subject for finding in found} == {"patch 1 of line"}
    assert "where it came from" in found[-1].problem


@pytest.mark.parametrize("own", [False, True])
def test_the_report_shows_imported_patches(target: Scenario, exported: Path, tmp_path: Path, own: bool) -> None:
    """Alone, and before an identification that was made here and has layer gaps."""
    import_patch(target.workspace, "line", exported)
    if own:
        target.identify("weapons", preset="fgsn-paper")
    page = write_report(target.workspace, "line", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "patch 1 of lineage line (animals): applied there by tester" in page
    assert "made on</dt><dd>elsewhere, the unpatched subject there" in page
    assert "those of the place it was made" in page
    assert "animals, patch 1: no layer gaps were recorded" in page
    assert ('<table id="table-layers-2"' in page) is own
    assert "neuronledger patch import line FILE --dimension animals" in page


def test_provenance_reads_back_what_it_writes(exported: Path) -> None:
    told = open_patch_file(exported).provenance
    assert Provenance.from_text(told.text(), exported) == told


def _run(scenario: Scenario, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_the_commands_take_a_patch_elsewhere(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    file = str(tmp_path / "animals.patch")
    told = _run(scenario, "patch", "export", "line", "1", file)
    assert sha256_of(Path(file)) in told
    assert "exists" in _run(scenario, "patch", "export", "line", "1", file, code=2)
    summary = json.loads(_run(scenario, "patch", "export", "line", "1", file, "--force", "--json"))
    assert summary["sha256"] == sha256_of(Path(file))

    arguments = ("patch", "import", "line", file)
    assert "nothing was written" in _run(target, *arguments, "--dry-run")
    planned = json.loads(_run(target, *arguments, "--dry-run", "--json", "--sha256", summary["sha256"]))
    assert planned["artifact"] == summary["artifact"]
    assert target.states() == []
    assert "not the one that was asked for" in _run(target, *arguments, "--sha256", "0" * 64, code=1)
    assert "It came from patch 1 of line (animals)" in _run(target, *arguments, "--reason", "shared")
    assert "is protected by patch 1" in _run(target, *arguments, code=1)
    assert "line 1" in _run(target, "patch", "list", "line")
    assert "from" not in _run(scenario, "patch", "list", "line").splitlines()[2]
    assert json.loads(_run(target, "patch", "show", "line", "1", "--json"))["patch"]["origin"]["lineage"] == "line"
    assert "It came from" in _run(target, "patch", "show", "line", "1")
    _run(target, "audit", "verify", "--weights")
    _run(target, "patch", "revert", "line")
    assert digests(target.working) == digests(target.trio.subject)
    assert "No such file" in _run(target, "patch", "import", "line", str(tmp_path / "none"), code=2)
