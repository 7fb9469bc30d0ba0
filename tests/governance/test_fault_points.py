"""Every point of an apply and of a revert at which something may fail or be killed: the version before or after.

Each point starts from the same lineage, which is put back as it was, so the points of a run are those of the one
before. A point is a change of a file (write, flush, rename, link, removal, truncation, new file or directory, mode) or
a COMMIT; at it an error is raised once (EIO) or from then on (ENOSPC, half of a write being stored), the process is
killed, or the power goes, which takes along what was not flushed.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import func, select

from governance.patching import apply_patch, revert_patch
from governance.recovery import recover
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import queries
from registry.database import Registry
from registry.head_lines import Head
from registry.schema import LedgerEvent, LineageLock
from tests.databases import Databases
from tests.fault_tally import Tally
from tests.governance.conftest import Trios
from tests.governance.faults import Effect, Fault, killed, struck_by
from tests.governance.scenarios import Scenario, Trio, build, digests

Act = Callable[[Workspace], object]
Subject = Literal["full", "lora", "lora that gains rank", "full, directions", "lora, directions", "full, in shards"]
SUBJECTS: tuple[Subject, ...] = (
    "full", "lora", "lora that gains rank", "full, directions", "lora, directions", "full, in shards",
)  # fmt: skip
ADAPTED = ["down_proj"]
SETTINGS: dict[str, Any] = {"budget": 0.05}
DIRECTIONS: dict[str, Any] = {
    "operation": "subspace", "protect": "directions", "directions": 2, "modules": ["down_proj"], "layers": "0..0",
}  # fmt: skip


@dataclass(frozen=True)
class Version:
    """A lineage's files, and what its registry says of it."""

    files: dict[str, str]
    applied: tuple[int, ...]
    claims: dict[str, dict[int, int]]
    directions: dict[str, dict[int, int]]
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
            directions=scenario.direction_ranks(),
            head=lineage.head.sequence if lineage.head else None,
            digest=lineage.state_digest,
        )


@dataclass(frozen=True)
class Stage:
    """A lineage that is put back as it was before an action, as often as asked for.

    Attributes:
        scenario: the lineage. Its registry is the same for all points, so that statements are compiled once, but
            nobody keeps a connection: neither the child that is killed nor the database that is put back.
        copy: content of the registry's directory before the action.
        put_back: puts the database back.
        act: the action.
        old, new: the versions before and after it.
        points: what the action does, in order.
    """

    scenario: Scenario
    copy: Path
    put_back: Callable[[], None]
    act: Act
    old: Version
    new: Version
    points: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """The registry's directory."""
        return self.scenario.workspace.directory

    def restore(self) -> None:
        """Put the lineage back."""
        self.scenario.workspace.registry.close()
        shutil.rmtree(self.directory)
        shutil.copytree(self.copy, self.directory)
        self.put_back()

    def run(self) -> None:
        """Act."""
        self.act(self.scenario.workspace)

    def require_old_or_new(self) -> Literal["old", "new"]:
        """Files, registry and ledger agree, nothing is left over, and all is as before the action or as after it."""
        scenario = self.scenario
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


def _prepare(
    databases: Databases, place: Path, trio: Trio, prompts: Path, settings: dict[str, Any], *, applies: bool
) -> Stage:
    directory = place / "registry"
    url = databases.migrated(directory)
    directory.mkdir(exist_ok=True)
    scenario = build(Workspace(Registry.open(url, directory=directory), actor="tester"), trio, prompts)
    scenario.apply("weapons", **settings)
    plan = scenario.plan("animals", **settings)
    if applies:
        act: Act = partial(apply_patch, plan=plan, reason="a concern")
    else:
        apply_patch(scenario.workspace, plan)
        act = partial(revert_patch, lineage_name="line")
    old = version_of(scenario)
    scenario.workspace.registry.close()
    shutil.copytree(directory, place / "copy")
    put_back = databases.keep(url)
    with struck_by(Fault(directory)) as counted:
        act(scenario.workspace)
    return Stage(scenario, place / "copy", put_back, act, old, version_of(scenario), tuple(counted.points))


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
            full, directed = subject.startswith("full"), subject.endswith("directions")
            shards = "10KB" if subject.endswith("shards") else None
            trio = trios(shard_size=shards) if full else adapter_trios(on_aligned=subject == "lora", targets=ADAPTED)
            settings = DIRECTIONS if directed else SETTINGS
            databases: Databases = request.getfixturevalue(f"{database}_databases")
            place = tmp_path_factory.mktemp("stage")
            made[database, subject, action] = _prepare(
                databases, place, trio, prompts, settings, applies=action == "apply"
            )
        return made[database, subject, action]

    yield stage
    for prepared in made.values():
        prepared.scenario.workspace.registry.close()
    for database in {key[0] for key in made}:
        request.getfixturevalue(f"{database}_databases").clean()


EFFECTS: dict[str, tuple[Effect, bool]] = {
    "EIO": (OSError(errno.EIO, "Input/output error"), True),
    "ENOSPC": (OSError(errno.ENOSPC, "No space left on device"), False),
    "kill": ("kill", True),
    "power cut": ("power cut", True),
}


def _strike(stage: Stage, number: int, effect: Effect, *, once: bool) -> Literal["old", "new"]:
    """Let one point fail, recover, and tell which version came of it."""
    stage.restore()
    fault = Fault(stage.directory, None, number, effect, once=once)
    if isinstance(effect, str):
        assert killed(fault, stage.run)
    else:
        with struck_by(fault), suppress(NeuronLedgerError, OSError):
            stage.run()
        assert fault.struck
    recover(stage.scenario.workspace)
    return stage.require_old_or_new()


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


FULL, GROWING = SUBJECTS[0], SUBJECTS[2]
RUNS: list[tuple[str, Subject, str]] = [
    ("sqlite", "lora", "EIO"),
    *(("sqlite", subject, "kill") for subject in SUBJECTS[3:]),
    ("sqlite", SUBJECTS[5], "EIO"),
    *(("sqlite", subject, "power cut") for subject in (SUBJECTS[3], SUBJECTS[5])),
    ("postgresql", SUBJECTS[3], "EIO"),
    *(("sqlite", subject, effect) for subject in (FULL, GROWING) for effect in EFFECTS),
    *(("postgresql", subject, effect) for subject in (FULL, GROWING) for effect in ("EIO", "kill")),
]


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize(("database", "subject", "effect"), RUNS)
def test_every_fault_point_leaves_the_version_before_or_after(
    stages: Stages, fault_tally: Tally, database: str, subject: Subject, effect: str, action: str
) -> None:
    assert _strike_every_point(stages(database, subject, action), fault_tally, effect) == {"old", "new"}


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_the_points_in_shards_are_those_of_several_files(stages: Stages, action: str) -> None:
    """There a file is flushed while the next one is written, so a fault may strike while another thread is at work."""
    flushed = {name for name in stages("sqlite", SUBJECTS[5], action).points if name.startswith("fsync lineages")}
    assert len(flushed) > 1


def test_more_than_two_hundred_fault_points_are_tried(stages: Stages) -> None:
    points = [
        len(stages(database, subject, act).points) for database, subject, _ in RUNS for act in ("apply", "revert")
    ]
    assert sum(points) > 200


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize(("subject", "effect"), [(FULL, "kill"), (GROWING, "power cut")])
def test_a_recovery_that_is_killed_at_any_fault_point_can_be_run_again(
    stages: Stages, fault_tally: Tally, subject: Subject, effect: str, action: str
) -> None:
    stage = stages("sqlite", subject, action)
    stage.restore()
    written = [n for n, name in enumerate(stage.points, start=1) if name.startswith(("write lineages", "rename line"))]
    assert killed(Fault(stage.directory, None, written[-1], "kill"), stage.run)
    copy = stage.copy.with_name("interrupted")
    shutil.copytree(stage.directory, copy)
    with struck_by(Fault(stage.directory)) as counted:
        recover(stage.scenario.workspace)
    recovered = replace(stage, copy=copy, act=recover, points=tuple(counted.points))
    assert _strike_every_point(recovered, fault_tally, effect) == {"old" if action == "apply" else "new"}


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("subject", [FULL, GROWING])
def test_a_system_that_writes_only_a_part_is_asked_again(stages: Stages, subject: Subject, action: str) -> None:
    stage = stages("sqlite", subject, action)
    for number in range(1, sum(name.startswith("write") for name in stage.points) + 1):
        stage.restore()
        with struck_by(Fault(stage.directory, "write", number, "short write")) as fault:
            stage.run()
        assert fault.struck
        assert stage.require_old_or_new() == "new"


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_change_of_a_file_passes_by_the_faults(stages: Stages, subject: Subject, action: str) -> None:
    """Whatever file an action changes by whatever way, the layer has seen it; and both transactions."""
    stage = stages("sqlite", subject, action)
    stage.restore()
    before = digests(stage.directory)
    stage.run()
    after = digests(stage.directory)
    seen = {name.partition(" ")[2] for name in stage.points}
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert {file for file in changed if not file.startswith("registry.db")} <= seen
    assert [name for name in stage.points if name.endswith(" sqlite")] == 2 * ["commit sqlite", "committed sqlite"]
