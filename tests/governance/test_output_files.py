"""Nothing is written on request over the registry's own files, over weights, or over what is no earlier report."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from governance.errors import InputError
from governance.output_files import require_elsewhere
from governance.reporting import write_report
from governance.workspace import Workspace
from tests.governance.scenarios import Scenario

WRITERS: dict[str, list[str]] = {
    "report": ["audit", "report", "line", "--output", "FILE"],
    "patch": ["patch", "export", "line", "1", "FILE", "--force"],
    "adapter": ["patch", "export", "line", "1", "FILE", "--as-adapter", "--force"],
    "pack": ["audit", "export", "line", "--output", "FILE", "--force"],
    "card": ["model", "card", "line", "--output", "FILE", "--force"],
    "heads": ["audit", "heads", "--output", "FILE"],
}
TAKEN: dict[str, tuple[Callable[[Scenario], Path], str]] = {
    "database": (lambda s: s.workspace.directory / "registry.db", "is the database of the registry"),
    "write-ahead log": (lambda s: s.workspace.directory / "registry.db-wal", "is the database of the registry"),
    "heads": (lambda s: s.workspace.directory / "ledger-heads.jsonl", "is the file of the ledger's heads"),
    "artifact": (lambda s: s.artifact(1), "lies in the artifacts of the registry"),
    "answers": (lambda s: s.workspace.directory / "answers", "is the stored answers of the registry"),
    "lineages": (lambda s: s.workspace.directory / "lineages" / "x", "lies in the working checkpoints"),
    "weights": (lambda s: s.working / "model.safetensors", "lies in the working checkpoint of lineage line"),
    "new file": (lambda s: s.working / "deep" / "new.html", "lies in the working checkpoint of lineage line"),
    "model": (lambda s: s.trio.aligned / "model.safetensors", "lies in the directory of model aligned"),
    "model's directory": (lambda s: s.trio.base, "is the directory of model base"),
}


def run(scenario: Scenario, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])


def files(scenario: Scenario) -> dict[Path, bytes]:
    """What must stay as it is; the ledger may grow by the refusal."""
    places = (scenario.working, scenario.workspace.directory / "artifacts", scenario.trio.aligned)
    return {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}


def test_no_command_writes_over_the_registry_or_weights(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    before = files(scenario)
    link = tmp_path / "link"
    for place, what in TAKEN.values():
        link.symlink_to(place(scenario))
        for path in (place(scenario), link):
            with pytest.raises(InputError, match=what):
                require_elsewhere(scenario.workspace, path)
        link.unlink()
    for command in WRITERS.values():
        for taken in ("database", "weights"):
            place, what = TAKEN[taken]
            result = run(scenario, *(str(place(scenario)) if word == "FILE" else word for word in command))
            assert (result.exit_code, what in result.stderr) == (2, True), result.output
    assert files(scenario) == before
    scenario.require_sound()


def test_the_files_of_a_registry_in_postgresql_are_its_own_too(workspace: Workspace, tmp_path: Path) -> None:
    for taken in (workspace.registry.heads.path, workspace.directory / "artifacts" / "new.html"):
        with pytest.raises(InputError):
            require_elsewhere(workspace, taken)
    require_elsewhere(workspace, tmp_path / "elsewhere.html")
    require_elsewhere(workspace, workspace.directory / "report.html")


def test_a_report_gives_way_to_a_report_and_nothing_else_does(scenario: Scenario, tmp_path: Path) -> None:
    report, other = tmp_path / "report.html", tmp_path / "notes.html"
    assert run(scenario, "audit", "report", "line", "--output", str(report)).exit_code == 0
    assert run(scenario, "audit", "report", "line", "--output", str(report)).exit_code == 0
    link = tmp_path / "link.html"
    link.symlink_to(report)
    write_report(scenario.workspace, "line", link)
    assert link.is_symlink()
    for content in (b"notes", b"", b"<html>"):
        other.write_bytes(content)
        with pytest.raises(InputError, match="is not a report"):
            write_report(scenario.workspace, "line", other)
        assert other.read_bytes() == content
    with pytest.raises(InputError, match="none is not a directory"):
        write_report(scenario.workspace, "line", tmp_path / "none" / "report.html")
    assert not (tmp_path / "none").exists()
