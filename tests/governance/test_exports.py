"""What is not exported, and what a failed export leaves: nothing."""

import errno
from pathlib import Path

import pytest
from sqlalchemy import text

from governance.errors import InputError, PatchFileError, PlanError, SpaceError
from governance.patch_export import export_patch
from governance.patching import apply_patch
from registry.errors import ArtifactError, RecordNotFoundError, RegistryError
from registry.heads import HeadFile
from tests.governance.exchange import sha256_of
from tests.governance.faults import Fault, Kind, flip_byte, struck_by
from tests.governance.scenarios import (
    Scenario,
)


def test_only_patches_that_were_applied_are_exported(scenario: Scenario, tmp_path: Path) -> None:
    plan = scenario.plan("animals")
    fault = Fault(scenario.working, "write", 1, effect=OSError(errno.EIO, "no"))
    with struck_by(fault), pytest.raises(OSError, match="no"):
        apply_patch(scenario.workspace, plan)
    scenario.apply("animals")
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    for sequence, error, match in (
        (1, PlanError, "patch 1 of lineage line is rejected"),
        (3, PlanError, "patch 3 of lineage line changes no row"),
        (4, RecordNotFoundError, "no patch 4"),
    ):
        with pytest.raises(error, match=match):
            export_patch(scenario.workspace, "line", sequence, place / "x.patch")
        assert scenario.events()[-1][1]["attempted"] == "patch.export"
    assert list(place.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_if_asked_to(scenario: Scenario, exported: Path, tmp_path: Path) -> None:
    first = exported.read_bytes()
    for path, match in ((exported, "exists"), (tmp_path, "is a directory"), (tmp_path / "no" / "x", "not a directory")):
        with pytest.raises(InputError, match=match):
            export_patch(scenario.workspace, "line", 1, path)
    assert exported.read_bytes() == first
    summary = export_patch(scenario.workspace, "line", 1, exported, force=True)
    assert exported.read_bytes() != first  # the ledger has grown since
    assert summary.sha256 == sha256_of(exported)
    assert summary.bytes == exported.stat().st_size


def test_a_damaged_artifact_is_not_exported(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    artifact = scenario.artifact(1)
    flip_byte(artifact, artifact.stat().st_size - 3)
    with pytest.raises(ArtifactError, match="was changed"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")
    assert not (tmp_path / "x.patch").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE patch_modules SET rows = rows + 1",
        "UPDATE patches SET settings = '{}'",
        "UPDATE identifications SET settings = '{}'",
    ],
)
def test_a_patch_whose_record_was_edited_is_not_exported(scenario: Scenario, tmp_path: Path, statement: str) -> None:
    scenario.apply("animals")
    with scenario.workspace.registry.write() as session:
        session.execute(text(statement))
    with pytest.raises(PatchFileError, match="audit verify"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_failing_disk_leaves_no_halfexport_to(scenario: Scenario, tmp_path: Path, operation: Kind) -> None:
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    with (
        struck_by(Fault(place, operation, 1, effect=OSError(errno.ENOSPC, "no space"))),
        pytest.raises(SpaceError, match="no space"),
    ):
        export_patch(scenario.workspace, "line", 1, place / "x.patch")
    assert list(place.iterdir()) == []
    assert [action for action, _ in scenario.events()][-1] == "refused"
    assert "patch.exported" not in dict(scenario.events())


def test_an_export_that_cannot_be_recorded_does_not_stay(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.apply("animals")

    def refuse(_: HeadFile) -> None:
        raise RegistryError("the head file cannot be written", "mend it")

    monkeypatch.setattr(HeadFile, "require_writable", refuse)
    with pytest.raises(RegistryError, match="head file"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")
    assert not (tmp_path / "x.patch").exists()
