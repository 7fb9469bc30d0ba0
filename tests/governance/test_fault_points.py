"""Every point of an apply and of a revert at which something may fail or be killed: the version before or after.

Each point starts from the same lineage, which is put back as it was, so the points of a run are those of the one
before. A point is a change of a file (write, flush, rename, link, removal, truncation, new file or directory, mode) or
a COMMIT; at it an error is raised once (EIO) or from then on (ENOSPC, half of a write being stored), the process is
killed, or the power goes, which takes along what was not flushed.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from sqlalchemy import func, select

from governance.patching import apply_patch, recover, revert_patch
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import queries
from registry.database import Registry
from registry.heads import Head
from registry.schema import LedgerEvent, LineageLock
from tests.databases import Databases
from tests.fault_tally import Tally
from tests.governance.conftest import Trios
from tests.governance.faults import Effect, Fault, killed, struck_by
from tests.governance.scenarios import Scenario, Trio, build, digests

Act = Callable[[Workspace], object]
Subject = Literal["full", "lora", "lora that gains rank"]
SUBJECTS: tuple[Subject, ...] = ("full", "lora", "lora that gains rank")
ADAPTED = ["down_proj"]
SETTINGS = {"budget": 0.05}


@dataclass(frozen=True)
class Version:
    """A lineage's files, and what its registry says of it."""

    files: dict[str, str]
    applied: tuple[int, ...]
    claims: dict[str, dict[int, int]]
    head: int | None
    digest: str


def version_of(scenario: Scenario) -> Version:
    """The version that a lineage is at."""
    with scenario.workspace.registry.read() as session:
        lineage = queries.get_lineage(session, scenario.name)
        return Version(
            files=digests(scenario.working),
            applied=tuple(patch.sequence for patch in queries.applied_patches(session, lineage.id)),
            claims=scenario.claims(),
            head=lineage.head.sequence if lineage.head else None,
            digest=lineage.state_digest,
        )


@dataclass(frozen=True)
class Stage:
    """A lineage that is put back as it was before an action, as often as asked for.

    Attributes:
        directory: where the registry's directory has to lie.
        copy: its content before the action.
        put_back: puts the database back.
        act: the action.
        old, new: the versions before and after it.
        points: what the action does, in order.
    """

    url: str
    trio: Trio
    directory: Path
    copy: Path
    put_back: Callable[[], None]
    act: Act
    old: Version
    new: Version
    points: tuple[str, ...]

    def restore(self) -> None:
        """Put the lineage back."""
        shutil.rmtree(self.directory)
        shutil.copytree(self.copy, self.directory)
        self.put_back()

    @contextmanager
    def open(self) -> Iterator[Scenario]:
        """The lineage with connections of its own."""
        with Registry.open(self.url, directory=self.directory) as registry:
            yield Scenario(Workspace(registry=registry, actor="tester"), self.trio)

    def run(self) -> None:
        """Act, in whatever process this is."""
        with self.open() as scenario:
            self.act(scenario.workspace)

    def require_old_or_new(self, scenario: Scenario) -> Literal["old", "new"]:
        """Files, registry and ledger agree, nothing is left over, and all is as before the action or as after it."""
        found = version_of(scenario)
        assert found in (self.old, self.new)
        scenario.require_sound()
        assert scenario.workspace.store.leftovers() == ()
        with scenario.workspace.registry.read() as session:
            events = session.scalar(select(func.count()).select_from(LedgerEvent))

            assert session.scalars(select(LineageLock)).all() == []
            assert queries.unfinished_patches(session) == ()
        heads = scenario.workspace.registry.heads.read()
        assert [head.count for head in heads if isinstance(head, Head)][-1] == events
        return "old" if found == self.old else "new"


def _prepare(databases: Databases, place: Path, trio: Trio, prompts: Path, *, applies: bool) -> Stage:
    directory = place / "registry"
    url = databases.migrated(directory)
    directory.mkdir(exist_ok=True)
    with Registry.open(url, directory=directory) as registry:
        scenario = build(Workspace(registry=registry, actor="tester"), trio, prompts)
        scenario.apply("weapons", **SETTINGS)
        plan = scenario.plan("animals", **SETTINGS)
        if applies:
            act: Act = partial(apply_patch, plan=plan, reason="a concern")
        else:
            apply_patch(scenario.workspace, plan)
            act = partial(revert_patch, lineage_name="line")
    shutil.copytree(directory, place / "copy")
    put_back = databases.keep(url)
    with Registry.open(url, directory=directory) as registry:
        scenario = Scenario(Workspace(registry=registry, actor="tester"), trio)
        old = version_of(scenario)
        with struck_by(Fault(directory)) as counted:
            act(scenario.workspace)
        new = version_of(scenario)
    return Stage(url, trio, directory, place / "copy", put_back, act, old, new, tuple(counted.points))


Stages = Callable[[str, Subject, str], Stage]


@pytest.fixture(scope="module")
def stages(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    trios: Trios,
    adapter_trios: Trios,
    prompts: Path,
) -> Iterator[Stages]:
    """Lineages by database, subject and action."""
    made: dict[tuple[str, ...], Stage] = {}

    def stage(database: str, subject: Subject, action: str) -> Stage:
        if (database, subject, action) not in made:
            trio = trios() if subject == "full" else adapter_trios(on_aligned=subject == "lora", targets=ADAPTED)
            databases: Databases = request.getfixturevalue(f"{database}_databases")
            place = tmp_path_factory.mktemp("stage")
            made[database, subject, action] = _prepare(databases, place, trio, prompts, applies=action == "apply")
        return made[database, subject, action]

    yield stage
    for database in {key[0] for key in made}:
        request.getfixturevalue(f"{database}_databases").clean()


def _strike(stage: Stage, number: int, effect: Effect, *, once: bool) -> Literal["old", "new"]:
    """Let one point fail, recover, and tell which version came of it."""
    stage.restore()
    fault = Fault(stage.directory, None, number, effect, once=once)
    if effect in {"kill", "power cut"}:
        assert killed(fault, stage.run)
        with stage.open() as scenario:
            recover(scenario.workspace)
            return stage.require_old_or_new(scenario)
    with stage.open() as scenario:
        with struck_by(fault), suppress(NeuronLedgerError, OSError):
            stage.act(scenario.workspace)
        assert fault.struck
        recover(scenario.workspace)
        return stage.require_old_or_new(scenario)


def _strike_every_point(stage: Stage, tally: Tally, effect: str) -> set[str]:
    """Let every point of a stage fail, one after the other; which versions came of it."""
    struck, once = EFFECTS[effect]
    ends: set[str] = set()
    problems: list[str] = []
    for number, name in enumerate(stage.points, start=1):
        tally.count(kills=isinstance(struck, str))
        try:
            ends.add(_strike(stage, number, struck, once=once))
        except (AssertionError, NeuronLedgerError, OSError) as problem:
            tally.mixtures += 1
            problems.append(f"point {number}, {name}: {type(problem).__name__} {problem}")
    assert not problems, "\n".join(problems)
    return ends


EFFECTS: dict[str, tuple[Effect, bool]] = {
    "EIO": (OSError(errno.EIO, "Input/output error"), True),
    "ENOSPC": (OSError(errno.ENOSPC, "No space left on device"), False),
    "kill": ("kill", True),
    "power cut": ("power cut", True),
}
FULL, GROWING = SUBJECTS[0], SUBJECTS[2]
RUNS: list[tuple[str, Subject, str]] = [
    *(("sqlite", subject, effect) for subject in SUBJECTS for effect in ("EIO", "kill")),
    *(("sqlite", subject, effect) for subject in (FULL, GROWING) for effect in ("ENOSPC", "power cut")),
    *(("postgresql", subject, effect) for subject in (FULL, GROWING) for effect in ("EIO", "kill")),
]


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize(("database", "subject", "effect"), RUNS)
def test_every_fault_point_leaves_the_version_before_or_after(
    stages: Stages, fault_tally: Tally, database: str, subject: Subject, effect: str, action: str
) -> None:
    assert _strike_every_point(stages(database, subject, action), fault_tally, effect) == {"old", "new"}


def test_more_than_two_hundred_fault_points_are_tried(stages: Stages) -> None:
    points = [
        len(stages(database, subject, act).points) for database, subject, _ in RUNS for act in ("apply", "revert")
    ]
    assert sum(points) > 200
