"""What somebody else writes into a working checkpoint is found, before a patch, while it is written and after it."""

import re
from pathlib import Path
from typing import Any

import pytest

from algorithms.checkpoints import Checkpoint
from governance import row_files, working_files
from governance.auditing import verify
from governance.dry_runs import dry_run
from governance.errors import SpaceError, WeightsChangedError
from governance.patching import apply_patch
from governance.recovery import recover
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.scenarios import Scenario, digests


def _offsets(scenario: Scenario, plan_module: str | None) -> tuple[Path, int]:
    """A byte of a tensor: of a module that the plan touches, or of the embedding."""
    checkpoint = Checkpoint.open(scenario.working)
    name = f"{plan_module}.weight" if plan_module else "model.embed_tokens.weight"
    stored = checkpoint.stored(name)
    return scenario.working / stored.file, stored.begin + 5


@pytest.mark.parametrize("where", ["touched", "untouched"])
def test_a_byte_that_somebody_changed_refuses_the_apply_and_is_not_hidden(scenario: Scenario, where: str) -> None:
    """Its size and time are as recorded, so only reading the tensors shows it."""
    plan = scenario.plan("animals")
    changed = next(
        module.module
        for module in plan.touched
        if 0 not in module.rows.tolist()  # the byte is outside the rows that the patch writes
    )
    path, offset = _offsets(scenario, changed if where == "touched" else None)
    flip_byte(path, offset)
    if where == "touched":
        with pytest.raises(WeightsChangedError):
            dry_run(scenario.workspace, plan)
    foreign = digests(scenario.working)
    with pytest.raises(WeightsChangedError) as refusal:
        apply_patch(scenario.workspace, plan)
    assert refusal.value.exit_code == 1
    if where == "touched":  # seen before anything says that the patch began
        assert scenario.states() == []
        assert digests(scenario.working) == foreign
    else:
        assert scenario.states() == ["rejected"]
        with pytest.raises(WeightsChangedError, match="changed outside the ledger"):
            scenario.apply("animals")
    findings = [finding.problem for finding in _findings(scenario)]
    tensor = f"{changed}.weight" if where == "touched" else "model.embed_tokens.weight"
    assert any(tensor in problem for problem in findings)
    flip_byte(path, offset)
    scenario.require_sound()
    assert scenario.apply("animals").state == "applied"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_byte_that_somebody_changed_refuses_the_revert_and_is_not_hidden(
    scenario: Scenario, *, interrupted: bool
) -> None:
    scenario.apply("animals")
    before = digests(scenario.working)
    path, offset = _offsets(scenario, None)
    if interrupted:
        with struck_by(Fault(scenario.working, "write", 2, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
            scenario.revert()
    flip_byte(path, offset)
    with pytest.raises(WeightsChangedError):
        recover(scenario.workspace) if interrupted else scenario.revert()
    assert scenario.states() == ["applied"]
    assert any("embed_tokens" in finding.problem for finding in _findings(scenario))
    flip_byte(path, offset)
    assert digests(scenario.working) == before
    scenario.require_sound()
    scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


@pytest.mark.parametrize("how", ["hard link", "symbolic link"])
def test_a_file_that_another_path_shares_is_never_written(scenario: Scenario, how: str, tmp_path: Path) -> None:
    plan = scenario.plan("animals")
    path = scenario.working / "model.safetensors"
    other = tmp_path / "backup.safetensors"
    if how == "hard link":
        other.hardlink_to(path)
    else:
        path.rename(other)
        path.symlink_to(other)
    before = other.read_bytes()
    for act in (dry_run, apply_patch):
        with pytest.raises(SpaceError, match=r"link|shared"):
            act(scenario.workspace, plan)
    assert (other.read_bytes(), scenario.states()) == (before, [])


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("tensor", "{tensor} of .* should have after the write"),
        ("header", "the header of {file} of .* is not what was recorded"),
    ],
)
def test_what_somebody_writes_into_a_file_while_rows_are_written_is_found(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, where: str, told: str
) -> None:
    """After the check, in rows that nobody touches or before the first tensor, before anything is read back."""
    plan = scenario.plan("animals")
    changed = next(module.module for module in plan.touched if 0 not in module.rows.tolist())
    stored = Checkpoint.open(scenario.working).stored(f"{changed}.weight")
    path = scenario.working / stored.file
    offset = path.read_bytes().index(b'"pt"') + 1 if where == "header" else stored.begin
    write_module = row_files._write_module

    def beside(target: Any, checkpoint: Any, artifact: Any, module: Any, side: Any) -> None:
        write_module(target, checkpoint, artifact, module, side)
        if side == "new" and module.name == changed:
            flip_byte(path, offset)

    monkeypatch.setattr(row_files, "_write_module", beside)
    with pytest.raises(WeightsChangedError) as refused:
        scenario.apply("animals")
    assert "could not be brought back" in str(refused.value)
    assert re.match(told.format(tensor=stored.name, file=stored.file), str(refused.value.__context__))
    flip_byte(path, offset)
    assert digests(scenario.working) == digests(scenario.trio.subject)
    recover(scenario.workspace)
    assert scenario.states() == ["rejected"]
    assert scenario.claims() == {}
    scenario.require_sound()


@pytest.mark.parametrize("readings", [1, 2])
def test_what_somebody_writes_while_a_revert_is_finished_is_found(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, readings: int
) -> None:
    """In a row that no patch writes, of a tensor that one does, once that was read so many times."""
    scenario.apply("animals")
    new = digests(scenario.working)
    with struck_by(Fault(scenario.working, "write", 2, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        scenario.revert()
    changed = next(module for module, rows in scenario.artifact_rows(1).items() if rows and 0 not in rows)
    path, offset = _offsets(scenario, changed)
    read, calls = working_files.tensor_changes, []

    def then_written(*arguments: Any) -> Any:
        changes = read(*arguments)
        calls.append(arguments)
        if len(calls) == readings:
            flip_byte(path, offset)
        return changes

    with monkeypatch.context() as patched:
        patched.setattr(working_files, "tensor_changes", then_written)
        with pytest.raises(WeightsChangedError):
            recover(scenario.workspace)
    assert scenario.states() == ["applied"]
    assert any(changed in finding.problem for finding in _findings(scenario))
    flip_byte(path, offset)
    assert digests(scenario.working) == new
    scenario.require_sound()


def _findings(scenario: Scenario) -> Any:
    return verify(scenario.workspace, weights=True).findings
