"""Failures and kills in the middle of a patch: the state is the one before or the one after, and nothing is hidden."""

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from algorithms.checkpoints import Checkpoint
from cli import main
from governance import patch_transactions, patching, row_files, working_files
from governance.auditing import verify
from governance.dry_runs import dry_run
from governance.errors import InterruptedPatchError, SpaceError, WeightsChangedError
from governance.patch_artifact import PatchArtifact, Side
from governance.patching import apply_patch
from governance.planning import plan_patch
from governance.recovery import RecoveryAction, recover
from registry.errors import NeuronProtectedError, RegistryError
from registry.heads import HeldHeads
from tests.governance.faults import Effect, Fault, Kind, killed, struck_by
from tests.governance.scenarios import Scenario, digests

Pick = Callable[[str], Scenario]
WHERE: list[tuple[str, Kind, str]] = [
    ("scenario", "write", "first"),
    ("scenario", "write", "last"),
    ("scenario", "fsync", "last"),
    ("lora_scenario", "write", "middle"),
    ("lora_scenario", "fsync", "first"),
    ("lora_scenario", "rename", "first"),
    ("lora_scenario", "rename", "last"),
]
POINTS = pytest.mark.parametrize(("kind", "operation", "position"), WHERE)


@pytest.fixture
def pick(request: pytest.FixtureRequest) -> Pick:
    """A scenario by the name of its fixture, so that only the one that is asked for is made."""
    return request.getfixturevalue


def _fault(scenario: Scenario, operation: Kind, position: str, act: Callable[[], Any], effect: Effect) -> Fault:
    """A fault at the first, middle or last such operation of what `act` does."""
    with struck_by(Fault(scenario.working, operation)) as counted:
        act()
    assert counted.count > 0
    at = {"first": 1, "middle": (counted.count + 1) // 2, "last": counted.count}[position]
    return Fault(scenario.working, operation, at, effect)


def _require_blocked(scenario: Scenario) -> None:
    """Every change of the lineage is refused until it is recovered."""
    for act in (
        scenario.revert,
        lambda: scenario.identify("weapons"),
        lambda: plan_patch(scenario.workspace, "line", 1),
    ):
        with pytest.raises(InterruptedPatchError, match="Run neuronledger recover") as refusal:
            act()
        assert refusal.value.exit_code == 3


@POINTS
def test_a_failing_disk_leaves_the_version_before_an_apply(
    pick: Pick, kind: str, operation: Kind, position: str
) -> None:
    scenario = pick(kind)
    code = errno.EIO if operation == "fsync" else errno.ENOSPC
    fault = _fault(scenario, operation, position, lambda: scenario.apply("animals"), OSError(code, "no"))
    scenario.revert()
    before = digests(scenario.working)
    plan = scenario.plan("animals")
    with struck_by(fault), pytest.raises(OSError, match="no") as failure:
        apply_patch(scenario.workspace, plan)
    assert failure.value.errno == code
    assert digests(scenario.working) == before
    assert (scenario.states(), scenario.claims()) == (["reverted", "rejected"], {})
    assert "no" in (scenario.patch(2).failure or "")
    actions = [action for action, _ in scenario.events()]
    assert actions[-3:] == ["patch.applying", "patch.undone", "refused"]
    scenario.require_sound()
    assert scenario.apply("animals").state == "applied"
    scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


@POINTS
def test_a_failing_disk_leaves_the_version_before_a_revert(
    pick: Pick, kind: str, operation: Kind, position: str
) -> None:
    scenario = pick(kind)
    scenario.apply("weapons")
    scenario.apply("animals")
    fault = _fault(scenario, operation, position, scenario.revert, OSError(errno.EIO, "no"))
    scenario.apply("animals")
    before, held = digests(scenario.working), scenario.claims()
    with struck_by(fault), pytest.raises(OSError, match="no"):
        scenario.revert()
    assert digests(scenario.working) == before
    assert scenario.states() == ["applied", "reverted", "applied"]
    assert scenario.claims() == held
    assert [action for action, _ in scenario.events()][-3:] == ["patch.reverting", "patch.revert-undone", "refused"]
    scenario.require_sound()
    scenario.revert()
    scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)


@pytest.mark.parametrize("failure", [RuntimeError("can't start new thread"), MemoryError()])
def test_what_the_system_does_not_give_leaves_the_version_before(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """After the first file was written: its flushing needs a thread and memory."""
    scenario.apply("weapons")
    old = digests(scenario.working)

    trailing = row_files.trailing

    def failing(work: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
        monkeypatch.setattr(row_files, "trailing", trailing)  # the undo gets what it needs
        for part in parts:
            work(part)
            raise failure
        yield

    for act in (lambda: scenario.apply("animals"), scenario.revert):
        monkeypatch.setattr(row_files, "trailing", failing)
        with pytest.raises(type(failure)):
            act()
    assert digests(scenario.working) == old
    assert scenario.states() == ["applied", "rejected"]
    told = [
        payload["failure"] for action, payload in scenario.events() if action in {"patch.undone", "patch.revert-undone"}
    ]
    assert told == [str(failure) or repr(failure)] * 2
    scenario.require_sound()


@POINTS
def test_an_apply_that_was_killed_is_taken_back(pick: Pick, kind: str, operation: Kind, position: str) -> None:
    scenario = pick(kind)
    scenario.apply("weapons")
    fault = _fault(scenario, operation, position, lambda: scenario.apply("animals"), KeyboardInterrupt())
    scenario.revert()
    before, held = digests(scenario.working), scenario.claims()
    plan = scenario.plan("animals")
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        apply_patch(scenario.workspace, plan)
    assert scenario.states() == ["applied", "reverted", "applying"]
    _require_blocked(scenario)
    assert recover(scenario.workspace) == [RecoveryAction("line", 3, "applying", "rejected")]
    assert digests(scenario.working) == before
    assert (scenario.states()[-1], scenario.claims()) == ("rejected", held)
    scenario.require_sound()
    assert recover(scenario.workspace) == []
    assert scenario.apply("animals").state == "applied"
    scenario.require_sound()


@POINTS
def test_a_revert_that_was_killed_is_finished(pick: Pick, kind: str, operation: Kind, position: str) -> None:
    scenario = pick(kind)
    scenario.apply("weapons")
    old = digests(scenario.working)
    scenario.apply("animals")
    fault = _fault(scenario, operation, position, scenario.revert, KeyboardInterrupt())
    scenario.apply("animals")
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        scenario.revert()
    assert scenario.states() == ["applied", "reverted", "reverting"]
    _require_blocked(scenario)
    assert recover(scenario.workspace) == [RecoveryAction("line", 3, "reverting", "reverted")]
    assert digests(scenario.working) == old
    assert {patch for rows in scenario.claims().values() for patch in rows.values()} == {1}
    scenario.require_sound()
    scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)


def test_rows_that_a_finished_revert_did_not_write_are_not_taken_for_written(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.apply("animals")
    new = digests(scenario.working)
    fault = _fault(scenario, "write", "first", scenario.revert, KeyboardInterrupt())
    scenario.apply("animals")
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        scenario.revert()

    write = working_files.write_rows

    def lost(checkpoint: Checkpoint, artifact: PatchArtifact, side: Side) -> tuple[str, ...]:
        if side == "new":
            return write(checkpoint, artifact, side)
        return tuple({checkpoint.stored(module.tensor).file for module in artifact.modules})

    with monkeypatch.context() as patched:
        patched.setattr(working_files, "write_rows", lost)
        with pytest.raises(WeightsChangedError, match="was not written as intended"):
            recover(scenario.workspace)
    assert scenario.states() == ["reverted", "applied"], "the patch stays, as its bytes do"
    assert digests(scenario.working) == new
    scenario.require_sound()


@pytest.mark.parametrize("kind", ["scenario", "lora_scenario"])
def test_a_kill_after_the_intent_and_one_before_the_result(
    pick: Pick, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = pick(kind)
    before = digests(scenario.working)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for module, point in ((patching, "write_change"), (patch_transactions, "finish_apply")):
        plan = scenario.plan("animals")
        with monkeypatch.context() as patch:
            patch.setattr(module, point, killed)
            with pytest.raises(KeyboardInterrupt):
                apply_patch(scenario.workspace, plan)
        assert scenario.states()[-1] == "applying"
        assert (digests(scenario.working) == before) == (point == "write_change")
        _require_blocked(scenario)
        recover(scenario.workspace)
        assert digests(scenario.working) == before
        scenario.require_sound()
    scenario.apply("animals")
    for module, point in ((patching, "write_change"), (patch_transactions, "finish_revert")):
        with monkeypatch.context() as patch:
            patch.setattr(module, point, killed)
            with pytest.raises(KeyboardInterrupt):
                scenario.revert()
        assert scenario.states()[-1] == "reverting"
        recover(scenario.workspace)
        assert digests(scenario.working) == before
        scenario.require_sound()
        scenario.apply("animals")


def test_a_recovery_that_is_killed_can_be_run_again(scenario: Scenario) -> None:
    plan = scenario.plan("animals")
    with struck_by(Fault(scenario.working, "fsync", 1, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        apply_patch(scenario.workspace, plan)
    with struck_by(Fault(scenario.working, "write", 3, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        recover(scenario.workspace)
    assert scenario.states() == ["applying"]
    recover(scenario.workspace)
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


@pytest.mark.parametrize("kind", ["scenario", "lora_scenario"])
def test_a_disk_that_stays_broken_leaves_it_to_recover(pick: Pick, kind: str) -> None:
    scenario = pick(kind)
    plan = scenario.plan("animals")
    broken = Fault(scenario.working, "write", 2, OSError(errno.EIO, "no"), once=False)
    with struck_by(broken), pytest.raises(OSError, match="no"):
        apply_patch(scenario.workspace, plan)
    assert scenario.states()[-1] in {"applying", "rejected"}  # an adapter's own files are still there
    recover(scenario.workspace)
    assert scenario.states() == ["rejected"]
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


def test_a_command_that_writes_clears_away_what_a_killed_one_left(scenario: Scenario) -> None:
    """Nothing was begun, so there is nothing to recover; but an artifact may be as large as the model."""
    workspace, plan = scenario.workspace, scenario.plan("animals")
    workspace.registry.close()
    assert killed(Fault(workspace.store.directory, "fsync", 1, "kill"), lambda: apply_patch(workspace, plan))
    assert len(workspace.store.leftovers()) == 1
    result = CliRunner().invoke(main, ["patch", "revert", "line", "--database", workspace.registry.url])
    assert "no applied patch" in result.stderr
    assert workspace.store.leftovers() == ()


@pytest.mark.parametrize("act", [dry_run, apply_patch])
def test_no_room_for_the_artifact_refuses_before_any_intent(scenario: Scenario, act: Callable[..., Any]) -> None:
    plan = scenario.plan("animals")
    store = scenario.workspace.store
    artifacts = store.list()
    full = Fault(store.directory, "write", 3, OSError(errno.ENOSPC, "No space left on device"))
    with struck_by(full), pytest.raises(SpaceError, match="No space"):
        act(scenario.workspace, plan)
    assert (scenario.states(), store.list(), store.leftovers()) == ([], artifacts, ())
    action, payload = scenario.events()[-1]
    assert (action, payload["error"]) == ("refused", "SpaceError")
    scenario.require_sound()


def test_a_second_claim_undoes_the_patch_that_wanted_it(scenario: Scenario) -> None:
    """The database refuses the claim at the very end; the rows that were written by then are taken back."""
    scenario.apply("weapons", budget=0.05)
    plan = scenario.plan("animals")
    before = digests(scenario.working)
    module = plan.touched[0]
    with scenario.workspace.registry.write() as session:
        session.execute(
            text("INSERT INTO protected_neurons (lineage_id, module_id, neuron, patch_id) VALUES (1, :m, :n, 1)"),
            {"m": module.module_id, "n": int(module.rows[0])},
        )
    with pytest.raises(NeuronProtectedError, match="is protected by patch 1") as refusal:
        apply_patch(scenario.workspace, plan)
    assert refusal.value.exit_code == 1
    assert digests(scenario.working) == before
    assert scenario.states() == ["applied", "rejected"]


def test_a_committed_patch_stays_when_only_the_head_file_fails(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = scenario.plan("animals")
    appended = HeldHeads.append
    calls: list[int] = []

    def failing(self: HeldHeads, *arguments: Any) -> bool:
        calls.append(1)
        if len(calls) == 2:
            raise RegistryError("the change is recorded, but the head file cannot be written", "make it writable")
        return appended(self, *arguments)

    monkeypatch.setattr(HeldHeads, "append", failing)
    with pytest.raises(RegistryError, match="the change is recorded"):
        apply_patch(scenario.workspace, plan)
    assert scenario.states() == ["applied"]
    assert {module: set(rows) for module, rows in scenario.claims().items()} == scenario.artifact_rows(1)
    (finding,) = verify(scenario.workspace, weights=True).findings
    assert "`neuronledger recover` completes it" in finding.problem
    recover(scenario.workspace)
    scenario.require_sound()
