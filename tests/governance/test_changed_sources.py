"""What a patch is made of may change under it: models, links, times and clocks. It is refused, or loses nothing."""

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms.checkpoints import Checkpoint
from algorithms.errors import MismatchError, NonFiniteError
from governance import patching, working_files
from governance.dry_runs import dry_run
from governance.errors import SpaceError, WeightsChangedError
from governance.lineage_state import read_lineage
from governance.patching import apply_patch
from governance.recovery import recover
from governance.weight_state import TensorState
from registry import queries
from registry.errors import ArtifactError
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.scenarios import Scenario, Trio, digests

DIRECTIONS = {"operation": "subspace", "protect": "directions", "directions": 2, "modules": ["down_proj"]}


def _copied(trio: Trio, place: Path) -> Trio:
    """Models that a test may write to; `flip_byte` keeps times."""
    subject = Path(shutil.copytree(trio.subject, place / "subject"))
    if trio.checkpoint is not None:
        return replace(trio, subject=subject)
    return replace(trio, subject=subject, aligned=Path(shutil.copytree(trio.aligned, place / "aligned")))


def _flip_factor(trio: Trio) -> None:
    """Change a byte of the subject's adapter, or back."""
    flip_byte(
        trio.subject / "adapter_model.safetensors", -3 + (trio.subject / "adapter_model.safetensors").stat().st_size
    )


# --- models that changed after they were registered, with size and times kept ---


@pytest.mark.parametrize("form", [{"shard_size": "6KB"}, {"family": "gpt2"}], ids=["shards", "stored transposed"])
def test_a_row_of_the_subject_that_changed_refuses_the_patch(
    scenarios: Scenarios, trios: Trios, tmp_path: Path, form: Mapping[str, Any]
) -> None:
    """Reverting would put it into the working checkpoint."""
    scenario = scenarios(_copied(trios(**form), tmp_path))
    before = digests(scenario.working)
    plan = scenario.plan("animals")
    module = scenario.subject_weights().modules[plan.touched[0].module]
    stored = Checkpoint.open(scenario.trio.subject).stored(module.tensor)
    row = int(plan.touched[0].rows[-1])
    item = stored.row_bytes // stored.shape[1]
    offset = stored.begin + row * (item if module.transposed else stored.row_bytes)
    flip_byte(scenario.trio.subject / stored.file, offset)
    for act in (dry_run, apply_patch):
        with pytest.raises(WeightsChangedError, match=f"rows of {module.tensor} .* not those that the patch would put"):
            act(scenario.workspace, plan)  # type: ignore[operator]
    assert (scenario.states(), digests(scenario.working)) == ([], before)
    flip_byte(scenario.trio.subject / stored.file, offset)
    assert apply_patch(scenario.workspace, plan).state == "applied"
    scenario.revert()
    assert digests(scenario.working) == before


@pytest.mark.parametrize("on_aligned", [True, False])
def test_an_adapter_is_not_composed_of_a_subject_that_changed(
    scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path, *, on_aligned: bool
) -> None:
    scenario = scenarios(_copied(adapter_trios(on_aligned=on_aligned), tmp_path))
    first = digests(scenario.working)
    scenario.apply("animals")
    plan, before = scenario.plan("weapons"), digests(scenario.working)
    _flip_factor(scenario.trio)
    with pytest.raises(WeightsChangedError, match="with its patches is not what was recorded"):
        scenario.revert()
    with pytest.raises(WeightsChangedError, match="with its patches is not what was recorded"):
        apply_patch(scenario.workspace, plan)
    assert (scenario.states(), digests(scenario.working)) == (["applied"], before)
    _flip_factor(scenario.trio)
    apply_patch(scenario.workspace, plan)
    scenario.revert(1)
    scenario.revert(2)
    assert digests(scenario.working) == first


@pytest.mark.parametrize("act", ["apply", "revert"])
def test_recovery_of_an_adapter_waits_for_its_subject(
    scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path, act: str
) -> None:
    scenario = scenarios(_copied(adapter_trios(on_aligned=True), tmp_path))
    first = digests(scenario.working)
    plan = scenario.plan("animals")
    if act == "revert":
        apply_patch(scenario.workspace, plan)
    with struck_by(Fault(scenario.working, "rename", 2, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        scenario.revert() if act == "revert" else apply_patch(scenario.workspace, plan)
    half = {name: digest for name, digest in digests(scenario.working).items() if not name.startswith(".")}
    _flip_factor(scenario.trio)
    with pytest.raises(WeightsChangedError, match="with its patches is not what was recorded"):
        recover(scenario.workspace)
    assert (scenario.states(), digests(scenario.working)) == ([f"{act}ing"], half)
    _flip_factor(scenario.trio)
    recover(scenario.workspace)
    assert digests(scenario.working) == first
    scenario.require_sound()


def test_a_damaged_artifact_of_a_later_patch_does_not_let_an_earlier_one_be_taken_back(scenario: Scenario) -> None:
    for dimension in ("weapons", "animals"):
        scenario.apply(dimension, **DIRECTIONS)
    before = digests(scenario.working)
    flip_byte(scenario.artifact(2), scenario.artifact(2).stat().st_size - 1)
    with pytest.raises(ArtifactError, match="was changed"):
        scenario.revert(1)
    assert (scenario.states(), digests(scenario.working)) == (["applied", "applied"], before)


# --- links ---


def test_a_hard_link_that_was_made_while_gates_measured_is_not_written_through(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup, judge = tmp_path / "backup.safetensors", patching.judge_patch

    def judged(*given: Any) -> Any:
        os.link(scenario.working / "model.safetensors", backup)
        return judge(*given)

    before = digests(scenario.working)
    plan = scenario.plan("animals")
    monkeypatch.setattr(patching, "judge_patch", judged)
    with pytest.raises(SpaceError, match="is shared by 2 paths"):
        apply_patch(scenario.workspace, plan)
    assert (scenario.states(), digests(scenario.working)) == ([], before)
    backup.unlink()
    monkeypatch.undo()
    assert apply_patch(scenario.workspace, plan).state == "applied"


def test_a_hard_link_that_is_made_after_the_intent_is_not_written_through(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup, write = tmp_path / "backup.safetensors", patching.write_change

    def written(*given: Any) -> Any:
        os.link(scenario.working / "model.safetensors", backup)
        return write(*given)

    before = digests(scenario.working)
    monkeypatch.setattr(patching, "write_change", written)
    with pytest.raises(SpaceError, match="is shared by 2 paths"):
        scenario.apply("animals")
    assert (scenario.states(), digests(scenario.working)) == (["applying"], before)
    backup.unlink()
    recover(scenario.workspace)
    assert (scenario.states(), digests(scenario.working)) == (["rejected"], before)


@pytest.mark.parametrize("act", ["apply", "revert"])
def test_a_directory_behind_a_symbolic_link_is_not_written_to(scenario: Scenario, tmp_path: Path, act: str) -> None:
    """Such as one to the subject."""
    plan = scenario.plan("animals")
    if act == "revert":
        apply_patch(scenario.workspace, plan)
    elsewhere = tmp_path / "elsewhere"
    scenario.working.rename(elsewhere)
    scenario.working.symlink_to(elsewhere)
    before = digests(elsewhere)
    with pytest.raises(SpaceError, match="is behind a symbolic link"):
        scenario.revert() if act == "revert" else apply_patch(scenario.workspace, plan)
    assert digests(elsewhere) == before


@pytest.mark.parametrize("act", ["apply", "revert"])
def test_recovery_does_not_write_behind_a_symbolic_link(scenario: Scenario, tmp_path: Path, act: str) -> None:
    before, plan = digests(scenario.working), scenario.plan("animals")
    if act == "revert":
        apply_patch(scenario.workspace, plan)
    with struck_by(Fault(scenario.working, "write", 2, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        scenario.revert() if act == "revert" else apply_patch(scenario.workspace, plan)
    elsewhere = tmp_path / "elsewhere"
    scenario.working.rename(elsewhere)
    scenario.working.symlink_to(elsewhere)
    half = digests(elsewhere)
    with pytest.raises(SpaceError, match="is behind a symbolic link"):
        recover(scenario.workspace)
    assert digests(elsewhere) == half
    scenario.working.unlink()
    elsewhere.rename(scenario.working)
    recover(scenario.workspace)
    assert digests(scenario.working) == before


# --- what reaches the disk, and when ---


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_was_undone_but_not_flushed_is_flushed_by_recovery(
    scenarios: Scenarios, trios: Trios, adapter_trios: Trios, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The new rows are on the disk; reading back fails, and so does the flush of the old ones."""
    scenario = scenarios(trios() if kind == "full" else adapter_trios(on_aligned=True))
    before, plan = digests(scenario.working), scenario.plan("animals")
    counted = Fault(scenario.working, "fsync")
    with struck_by(counted):
        apply_patch(scenario.workspace, plan)
    scenario.revert()

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "reading back failed")

    again = scenario.plan("animals")
    fault = Fault(scenario.working, "fsync", counted.count + 1, OSError(errno.EIO, "flushing failed"))
    monkeypatch.setattr(working_files, "_require_expected", failing)
    with struck_by(fault), pytest.raises(OSError, match="flushing failed"):
        apply_patch(scenario.workspace, again)
    monkeypatch.undo()
    assert scenario.states()[-1] == "applying"
    cut = Fault(scenario.working)
    cut.unflushed = fault.unflushed
    with struck_by(cut):
        recover(scenario.workspace)
    cut.unflushed.lose()
    assert digests(scenario.working) == before
    assert scenario.states() == ["reverted", "rejected"]
    scenario.require_sound()


def test_a_write_between_reading_back_and_recording_is_seen_by_the_next_command(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = working_files.measure_tensors

    def measured(directory: Path, *given: Any) -> tuple[TensorState, ...]:
        found = measure(directory, *given)
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return found

    plan = scenario.plan("animals")
    monkeypatch.setattr(working_files, "measure_tensors", measured)
    apply_patch(scenario.workspace, plan)
    monkeypatch.undo()
    with pytest.raises(WeightsChangedError, match="changed outside the ledger"):
        read_lineage(scenario.workspace, scenario.name)


def test_a_plan_that_waited_leaves_newer_times_of_other_files(scenarios: Scenarios, trios: Trios) -> None:
    scenario = scenarios(trios(shard_size="10KB"))
    waiting = scenario.plan("animals", layers="0..0")
    scenario.apply("weapons", layers="1..1")
    scenario.revert()
    apply_patch(scenario.workspace, waiting)
    with scenario.workspace.registry.read() as session:
        recorded = {file.file: file.modified_ns for file in queries.get_lineage(session, scenario.name).files}
    assert recorded == {file: (scenario.working / file).stat().st_mtime_ns for file in recorded}


# --- numbers that do not fit ---


@pytest.mark.parametrize("method", ["fgsn", "nlsr"])
def test_rows_that_are_too_large_for_the_files_dtype_are_refused(
    scenarios: Scenarios, trios: Trios, tmp_path: Path, method: str
) -> None:
    trio = _copied(trios(), tmp_path)
    _rewrite(trio.subject / "model.safetensors", lambda name, tensor: tensor.half())
    _rewrite(trio.aligned / "model.safetensors", _with_large_entries)
    scenario = scenarios(trio)
    with pytest.raises(NonFiniteError, match="too large for F16"):
        dry_run(scenario.workspace, scenario.plan("animals", method=method))
    assert scenario.states() == []


def test_an_adapter_of_two_dtypes_gains_no_rows(scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path) -> None:
    trio = _copied(adapter_trios(on_aligned=False), tmp_path)
    file = trio.subject / "adapter_model.safetensors"
    _rewrite(file, lambda name, tensor: tensor.bfloat16() if "lora_A" in name else tensor)
    scenario = scenarios(trio)
    with pytest.raises(MismatchError, match=r"lora_A of .* is BF16 and lora_B F32"):
        dry_run(scenario.workspace, scenario.plan("animals"))


def _rewrite(file: Path, change: Any) -> None:
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _with_large_entries(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "proj" in name:
        tensor[:, 0] = 7e4
    return tensor
