"""What is not exported, and what a failed export leaves: nothing."""

import errno
import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from governance.adapter_export import export_adapter
from governance.errors import InputError, PatchFileError, PlanError, SpaceError
from governance.patch_export import export_patch
from governance.patching import apply_patch
from governance.workspace import Workspace
from registry.database import Registry
from registry.errors import ArtifactError, RecordNotFoundError, RegistryError
from registry.heads import HeadFile
from tests.governance.exchange import sha256_of
from tests.governance.faults import Fault, flip_byte, killed, struck_by
from tests.governance.scenarios import (
    Scenario,
)


def test_only_patches_that_were_applied_are_exported(scenario: Scenario, tmp_path: Path) -> None:
    plan = scenario.plan("animals")
    fault = Fault(scenario.working, "write", 1, OSError(errno.EIO, "no"))
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


def test_wherever_the_disk_fails_no_half_export_is_left(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    with struck_by(Fault(place)) as counted:
        export_patch(scenario.workspace, "line", 1, place / "x.patch")
    (place / "x.patch").unlink()
    assert {point.split()[0] for point in counted.points} >= {"create", "write", "fsync", "commit", "rename"}
    for at in range(1, counted.count + 1):
        fault = Fault(place, None, at, OSError(errno.ENOSPC, "No space left on device"))
        with struck_by(fault), pytest.raises((SpaceError, RegistryError), match=r"space|full"):
            export_patch(scenario.workspace, "line", 1, place / "x.patch")
        assert fault.struck
        assert list(place.iterdir()) == []
    scenario.require_sound()


@pytest.mark.parametrize("as_adapter", [False, True])
def test_a_kill_leaves_no_export_that_the_ledger_does_not_know(
    scenario: Scenario, tmp_path: Path, as_adapter: bool
) -> None:
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    url = scenario.workspace.registry.url

    def act() -> None:
        with Registry.open(url) as registry:
            workspace = Workspace(registry=registry, actor="tester")
            if as_adapter:
                export_adapter(workspace, "line", 1, place / "adapter")
            else:
                export_patch(workspace, "line", 1, place / "x.patch")

    with struck_by(Fault(place)) as counted:
        act()
    turning = [n for n, name in enumerate(counted.points, start=1) if name.startswith(("commit", "rename"))]
    for at in (*turning, counted.count):
        shutil.rmtree(place)
        place.mkdir()
        assert killed(Fault(place, None, at, "kill"), act)
        known = {
            digest
            for action, told in scenario.events()
            if action == "patch.exported"
            for digest in told["files"].values()
        }
        files = [path for path in place.rglob("*") if path.is_file() and not path.name.endswith(".writing")]
        assert all(sha256_of(path) in known for path in files)
    scenario.require_sound()


def test_an_export_that_cannot_be_recorded_is_not_made(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.apply("animals")

    def refuse(_: HeadFile) -> None:
        raise RegistryError("the head file cannot be written", "mend it")

    monkeypatch.setattr(HeadFile, "held", refuse)
    with pytest.raises(RegistryError, match="head file"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")
    assert not (tmp_path / "x.patch").exists()
