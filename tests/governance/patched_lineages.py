"""Lineages with two applied patches and a reverted one, whose working checkpoint a test may damage and put back."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from sqlalchemy import text

from cli import main
from governance.lineages import create_lineage
from governance.workspace import Workspace
from registry.database import Registry
from tests.governance.scenarios import Scenario, Trio

Registered = Callable[[Trio], Path]


@dataclass(frozen=True)
class PatchedLineage:
    """A scenario and what its registry's directory was when it was made."""

    scenario: Scenario
    pristine: Path

    @property
    def working(self) -> Path:
        """The working checkpoint."""
        return self.scenario.working

    def restore(self) -> None:
        """Put the working checkpoint back, times included."""
        shutil.rmtree(self.working, ignore_errors=True)
        shutil.copytree(self.pristine / self.working.name, self.working)

    def run(self, *arguments: str) -> Result:
        """Run a command on the lineage's registry."""
        return CliRunner().invoke(main, [*arguments, "--database", self.scenario.workspace.registry.url])


@contextmanager
def patched_lineage(place: Path, registry_of: Registered, trio: Trio) -> Iterator[PatchedLineage]:
    """Patches 1 and 3 applied, patch 2 taken back; no file shared with the subject."""
    directory = place / "registry"
    shutil.copytree(registry_of(trio), directory)
    with Registry.open(f"sqlite:///{directory / 'registry.db'}") as registry:
        workspace = Workspace(registry=registry, actor="tester")
        create_lineage(workspace, "line", subject="subject", aligned="aligned", base="base")
        scenario = Scenario(workspace, trio)
        for file in scenario.working.iterdir():
            unshare(file)
        scenario.apply("weapons", budget=0.3)
        scenario.apply("animals", score="random", seed=1, budget=0.2)
        scenario.apply("insults", score="random", seed=2, budget=0.2)
        scenario.revert(2)
        shutil.copytree(scenario.working, place / "pristine" / scenario.working.name)
        yield PatchedLineage(scenario, place / "pristine")


def unshare(file: Path) -> None:
    """Make a file that is a hard link a copy of its own, with the same times."""
    if file.stat().st_nlink > 1:
        shutil.copy2(file, file.with_suffix(".copy"))
        file.with_suffix(".copy").replace(file)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write bytes into a file and leave its size and modification time as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def invert(path: Path, begin: int, end: int) -> None:
    """Change every byte of a range and leave the file's size and modification time as they were."""
    content = path.read_bytes()[begin:end]
    overwrite(path, begin, bytes(byte ^ 0xFF for byte in content))


def change_records(scenario: Scenario, *statements: str) -> None:
    """Run SQL as somebody would who owns the database: triggers are dropped first."""
    with scenario.workspace.registry.write() as session:
        for trigger in session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
            session.execute(text(f"DROP TRIGGER {trigger}"))
        for statement in statements:
            assert session.execute(text(statement)).rowcount > 0  # type: ignore[attr-defined]


FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"shard_size": "6KB"},
    "stored transposed": {"family": "gpt2"},
    "LoRA whose rank grows": {"on_aligned": False},
    "LoRA whose rank stays": {"on_aligned": True},
}
