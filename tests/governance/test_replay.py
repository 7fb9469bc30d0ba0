"""`audit replay`: subject and artifacts give the head byte for byte, and whatever does not agree with them is named."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from algorithms.checkpoints import Checkpoint
from algorithms.weights import open_weights
from cli import main
from governance import replay as replay_module
from governance import row_files
from governance.errors import WeightsChangedError
from governance.lineages import create_lineage
from governance.patching import apply_patch
from governance.replay import Replay, replay
from governance.workspace import Workspace
from registry import locks
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.patched_lineages import PatchedLineage, change_records, invert, patched_lineage
from tests.governance.scenarios import HARMFUL, Scenario, Trio, build, digests

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def full(tmp_path: Path, registered: Callable[[Trio], Path], trios: Trios) -> Iterator[PatchedLineage]:
    """A patched full checkpoint to damage, and a registry to change."""
    with patched_lineage(tmp_path, registered, trios()) as patched:
        yield patched


def _replay(scenario: Scenario, output: Path | None = None) -> Replay:
    return replay(scenario.workspace, "line", output)


def _run(scenario: Scenario, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["audit", "replay", "line", *options, "--database", scenario.workspace.registry.url]
    )


def _require_disagreement(scenario: Scenario, *named: str) -> list[dict[str, Any]]:
    """The command exits with 1 and names each thing on stderr and in JSON; the findings as JSON has them."""
    result = _run(scenario)
    assert (result.exit_code, "is what was recorded" in result.output) == (1, False), result.output
    assert "disagree." in result.stderr.splitlines()[-1]
    for name in named:
        assert name in result.stderr
    told = _run(scenario, "--json")
    assert (told.exit_code, told.stderr) == (1, "")
    content = json.loads(told.stdout)
    assert content["agrees"] is False
    findings: list[dict[str, Any]] = content["findings"]
    return findings


@pytest.mark.parametrize("block_bytes", [8 * 2**20, 300])
def test_the_head_is_rebuilt_byte_for_byte(
    patched_forms: PatchedLineage, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "BLOCK_BYTES", block_bytes)
    scenario = patched_forms.scenario
    outcome = _replay(scenario, tmp_path / "rebuilt")
    assert (outcome.findings, outcome.patches, outcome.output) == ((), (1, 3), tmp_path / "rebuilt")
    assert digests(tmp_path / "rebuilt") == digests(patched_forms.working)
    assert [path.name for path in tmp_path.iterdir()] == ["rebuilt"]
    assert all((tmp_path / "rebuilt" / name).stat().st_nlink == 1 for name in digests(tmp_path / "rebuilt"))
    open_weights(tmp_path / "rebuilt", scenario.trio.checkpoint)


def test_what_was_there_before_and_after_each_patch_is_derived(patched_forms: PatchedLineage) -> None:
    """Patch 3 was written while patch 2, taken back since, still stood: its artifact is read for that."""
    states = {state.moment: state for state in _replay(patched_forms.scenario).states}
    assert {moment: state.patches for moment, state in states.items()} == {
        "of the head": (1, 3),
        "before patch 1": (),
        "after patch 1": (1,),
        "before patch 3": (1, 2),
        "after patch 3": (1, 2, 3),
    }
    assert all(state.agrees for state in states.values())
    assert len({state.rebuilt for state in states.values()}) == len(states)


def test_a_lineage_without_patches_gives_the_subject(patched_forms: PatchedLineage, tmp_path: Path) -> None:
    scenario = patched_forms.scenario
    create_lineage(scenario.workspace, "plain", subject="subject", aligned="aligned", base="base")
    outcome = replay(scenario.workspace, "plain", tmp_path / "rebuilt")
    assert (outcome.findings, outcome.patches, len(outcome.states)) == ((), (), 1)
    subject = {name: digest for name, digest in digests(scenario.trio.subject).items() if not name.startswith(".")}
    assert digests(tmp_path / "rebuilt") == subject


def test_the_command_says_what_was_rebuilt(patched_forms: PatchedLineage, tmp_path: Path) -> None:
    result = _run(patched_forms.scenario, "--output", str(tmp_path / "rebuilt"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"Wrote {tmp_path / 'rebuilt'}" in result.stdout
    assert result.stdout.endswith("The rebuilt head is what was recorded and what the working checkpoint holds.\n")
    content = json.loads(_run(patched_forms.scenario, "--json").stdout)
    assert (content["agrees"], content["findings"], content["output"]) == (True, [], None)
    assert [state["agrees"] for state in content["states"]] == [True] * 5


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders=st.permutations([1, 2, 3, 4]), lora=st.booleans())
def test_any_order_of_taking_patches_back_can_be_replayed(
    scenario: Scenario, lora_scenario: Scenario, orders: list[int], lora: bool
) -> None:
    chosen = lora_scenario if lora else scenario
    first = len(chosen.states())
    for seed, name in enumerate([*HARMFUL, "animals"]):
        chosen.apply(name, score="random", seed=seed, budget=0.1)
    for sequence in orders[:3]:
        chosen.revert(first + sequence)
        outcome = _replay(chosen)
        assert outcome.findings == ()
        assert len(outcome.states) == 1 + 2 * len(outcome.patches)
    chosen.revert()
    assert _replay(chosen).digest == chosen.patch(1).digest_before


def test_a_damaged_working_checkpoint_is_named_and_can_be_replaced(full: PatchedLineage, tmp_path: Path) -> None:
    healthy = digests(full.working)
    stored = Checkpoint.open(full.working).stored(UP)
    for row in (2, 7):
        invert(
            full.working / stored.file, stored.begin + row * stored.row_bytes, stored.begin + row * stored.row_bytes + 1
        )
    (full.working / "config.json").write_text("{}")
    findings = _require_disagreement(
        full.scenario,
        f"model.safetensors, tensor {UP}, rows 2, 7: the working checkpoint holds other bytes",
        "config.json",
    )
    assert {finding["kind"] for finding in findings} == {"tensor", "file"}
    result = _run(full.scenario, "--output", str(tmp_path / "rebuilt"))
    assert result.exit_code == 1
    assert digests(tmp_path / "rebuilt") == healthy
    shutil.rmtree(full.working)
    findings = _require_disagreement(full.scenario, "model.safetensors: is missing", "tokenizer.json: is missing")
    (tmp_path / "rebuilt").rename(full.working)
    assert _replay(full.scenario).agrees


def test_a_damaged_adapter_is_named_and_can_be_replaced(lora_scenario: Scenario, tmp_path: Path) -> None:
    lora_scenario.apply("animals")
    healthy = digests(lora_scenario.working)
    weights = lora_scenario.working / "adapter_model.safetensors"
    flip_byte(weights, weights.stat().st_size - 1)
    findings = _require_disagreement(lora_scenario, "adapter_model.safetensors, tensor base_model.model.")
    assert [finding["count"] for finding in findings] == [1]
    weights.write_bytes(weights.read_bytes()[:-100])
    _require_disagreement(lora_scenario, "ends 100 bytes early", "missing: the file ends before")
    assert _replay(lora_scenario, tmp_path / "rebuilt").output is not None
    assert digests(tmp_path / "rebuilt") == healthy


RECORDS = {
    "a tensor": (
        f"UPDATE lineage_tensors SET digest = '{'0' * 64}' WHERE name = '{UP}'",
        f"tensor {UP}: the rebuilt tensor is not what was recorded",
        False,
    ),
    "a tensor's name": (
        f"UPDATE lineage_tensors SET name = 'other' WHERE name = '{UP}'",
        "tensor other: recorded, but not in the subject",
        False,
    ),
    "a file": (
        f"UPDATE lineage_files SET digest = '{'0' * 64}' WHERE file = 'model.safetensors'",
        "model.safetensors: the rebuilt file is not what was recorded",
        False,
    ),
    "the head": (
        f"UPDATE lineages SET state_digest = '{'0' * 64}'",
        "the digest recorded of the head is not that of the subject with patches 1, 3",
        False,
    ),
    "before a patch": (
        f"UPDATE patches SET digest_before = '{'0' * 64}' WHERE sequence = 1",
        "the digest recorded before patch 1 is not that of the subject with no patch",
        True,
    ),
    "after a patch": (
        f"UPDATE patches SET digest_after = '{'0' * 64}' WHERE sequence = 3",
        "the digest recorded after patch 3 is not that of the subject with patches 1, 2, 3",
        True,
    ),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_was_changed_is_named_and_no_other_head_is_written(
    full: PatchedLineage, record: str, tmp_path: Path
) -> None:
    statement, named, trusted = RECORDS[record]
    change_records(full.scenario, statement)
    _require_disagreement(full.scenario, named)
    result = _run(full.scenario, "--output", str(tmp_path / "rebuilt"))
    assert result.exit_code == 1
    assert (tmp_path / "rebuilt").exists() == trusted
    assert ("Nothing was written" in result.stderr) == (not trusted)


def test_a_changed_subject_is_named_and_nothing_is_written(
    sqlite_workspace: Workspace, tmp_path: Path, trios: Trios, prompts: Path
) -> None:
    trio = trios()
    shutil.copytree(trio.subject, tmp_path / "subject")
    scenario = build(sqlite_workspace, Trio(tmp_path / "subject", trio.aligned, trio.base), prompts)
    scenario.apply("animals")
    stored = Checkpoint.open(scenario.working).stored("model.norm.weight")
    flip_byte(tmp_path / "subject" / stored.file, stored.begin)
    _require_disagreement(
        scenario,
        "tensor model.norm.weight: the subject's own tensor is not what was registered",
        "tensor model.norm.weight, element 0: the working checkpoint holds other bytes",
        "the digest recorded of the head",
    )
    assert _replay(scenario, tmp_path / "rebuilt").output is None
    assert not (tmp_path / "rebuilt").exists()


def test_without_the_artifact_of_an_applied_patch_nothing_is_rebuilt(full: PatchedLineage, tmp_path: Path) -> None:
    full.scenario.artifact(1).unlink()
    result = _run(full.scenario, "--output", str(tmp_path / "rebuilt"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "artifact" in result.stderr
    assert not (tmp_path / "rebuilt").exists()


def test_without_the_artifact_of_a_reverted_patch_the_head_is_still_rebuilt(full: PatchedLineage) -> None:
    full.scenario.artifact(2).unlink()
    outcome = _replay(full.scenario)
    assert outcome.agrees
    assert {state.moment for state in outcome.states if state.agrees is None} == {"before patch 3", "after patch 3"}
    assert "not checked" in _run(full.scenario).stdout


def test_an_artifact_of_another_subject_is_refused(full: PatchedLineage, scenarios: Scenarios, trios: Trios) -> None:
    other = scenarios(trios(family="gpt2"))
    other.apply("animals")
    source = other.artifact(1)
    store = full.scenario.workspace.store
    with store.writer() as temporary:
        temporary.write_bytes(source.read_bytes())
        digest = store.commit(temporary)
    change_records(full.scenario, f"UPDATE patches SET artifact_digest = '{digest}' WHERE sequence = 1")
    result = _run(full.scenario)
    assert result.exit_code == 2
    assert "was not made for the subject" in result.stderr
    explained = full.run("audit", "explain", "line")
    assert explained.exit_code == 1
    assert "the rows of patch 1 cannot be checked" in explained.stderr


def _used(working: Path, tmp: Path) -> Path:
    (tmp / "used").mkdir()
    (tmp / "used" / "file").touch()
    return tmp / "used"


def _file(working: Path, tmp: Path) -> Path:
    (tmp / "file").touch()
    return tmp / "file"


OUTPUTS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "in use": (_used, "is not an empty directory"),
    "a file": (_file, "is not an empty directory"),
    "in the working checkpoint": (
        lambda working, tmp: working / "rebuilt",
        "lies in the working checkpoint of lineage line",
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_used_is_refused(full: PatchedLineage, case: str, tmp_path: Path) -> None:
    make, named = OUTPUTS[case]
    output = make(full.working, tmp_path)
    before = {path: digests(path) for path in (full.working, tmp_path / "used")}
    result = _run(full.scenario, "--output", str(output))
    assert (result.exit_code, result.stdout) == (2, "")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path: digests(path) for path in before} == before


@pytest.mark.parametrize("operation", ["fsync", "write"])
def test_a_full_disk_leaves_no_output(full: PatchedLineage, tmp_path: Path, operation: Any) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with struck_by(Fault(place, operation, 2, OSError(errno.ENOSPC, "No space left on device"))):
        result = _run(full.scenario, "--output", str(place / "rebuilt"))
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("form", ["full", "lora"])
def test_an_output_that_reads_back_differently_is_refused(
    form: str, scenario: Scenario, lora_scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = scenario if form == "full" else lora_scenario
    chosen.apply("animals")
    monkeypatch.setattr(replay_module, "write_rows" if form == "full" else "write_adapter", lambda *_: None)
    with pytest.raises(WeightsChangedError, match="other bytes were read back"):
        _replay(chosen, tmp_path / "rebuilt")
    assert not (tmp_path / "rebuilt").exists()


@pytest.mark.parametrize("act", ["applying", "reverting"])
@pytest.mark.parametrize("form", ["scenario", "lora_scenario"])
def test_the_head_before_an_interrupted_patch_is_rebuilt_although_weights_are_lost(
    form: str, act: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario: Scenario = request.getfixturevalue(form)
    scenario.apply("weapons")
    plan, healthy = scenario.plan("animals"), digests(scenario.working)
    with struck_by(Fault(scenario.working, "fsync", 1, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        apply_patch(scenario.workspace, plan) if act == "applying" else scenario.revert()
    assert scenario.states()[-1] == act
    for file in scenario.working.glob("*.safetensors"):
        file.unlink()
    settled = _run(scenario)
    assert (settled.exit_code, settled.stdout) == (3, "")
    with monkeypatch.context() as alive:
        alive.setattr(locks, "liveness", lambda _: "alive")
        held = _run(scenario, "--output", str(tmp_path / "held"))
        assert (held.exit_code, "is held by process" in held.stderr, (tmp_path / "held").exists()) == (3, True, False)
    result = _run(scenario, "--output", str(tmp_path / "rebuilt"))
    number = 2 if act == "applying" else 1
    assert f"Patch {number} of line was interrupted" in result.stdout
    assert result.exit_code == 1, "the working checkpoint is something else"
    assert digests(tmp_path / "rebuilt") == healthy


@pytest.mark.parametrize("form", ["scenario", "lora_scenario"])
def test_a_lost_working_checkpoint_is_written_where_it_was(form: str, request: pytest.FixtureRequest) -> None:
    scenario: Scenario = request.getfixturevalue(form)
    scenario.apply("weapons")
    healthy = digests(scenario.working)
    assert "lies in" not in (refused := _run(scenario, "--output", str(scenario.working))).stderr
    assert refused.exit_code == 2
    shutil.rmtree(scenario.working)
    assert _run(scenario, "--output", str(scenario.working)).exit_code == 1, "it was not there"
    assert digests(scenario.working) == healthy
    assert _replay(scenario).agrees
    scenario.require_sound()
    scenario.apply("animals")
    scenario.require_sound()


def test_replaying_writes_nothing(patched_forms: PatchedLineage) -> None:
    before = digests(patched_forms.working), patched_forms.scenario.events()
    assert _replay(patched_forms.scenario).agrees
    assert (digests(patched_forms.working), patched_forms.scenario.events()) == before
