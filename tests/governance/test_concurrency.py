"""Sixteen writers released at once: one patch wins, every other one is told to plan again, and nothing is mixed up."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from governance import lineage_state, patch_transactions
from governance.patching import apply_patch
from governance.recovery import recover
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry.database import Registry
from registry.head_lines import check_ledger
from registry.ledger import events
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, Kind, struck_by
from tests.governance.scenarios import HARMFUL, build, digests, require_only_rows_differ
from tests.lock_step import Together, Wait, in_processes, in_threads

WRITERS = 16


@pytest.mark.parametrize("together", [in_threads, in_processes])
def test_of_many_patches_planned_on_one_head_one_wins(
    workspace: Workspace, registry_url: str, trios: Trios, prompts: Path, together: Together
) -> None:
    scenario = build(workspace, trios(), prompts)
    scenario.apply("weapons")
    held = scenario.claims()
    before = len(scenario.events())
    names = sorted(HARMFUL)
    found = {(name, budget): scenario.plan(name, budget=budget) for name in names for budget in (0.1, 0.2)}
    plans = [list(found.values())[number % len(found)] for number in range(WRITERS)]

    workspace.registry.close()

    def writer(number: int, wait: Wait) -> str:
        """What became of one writer's patch: "applied", or the class and exit code of the refusal."""
        torch.set_num_threads(1)
        with Registry.open(registry_url, directory=workspace.directory) as registry:
            wait()
            try:
                apply_patch(Workspace(registry=registry, actor="writer"), plans[number])
            except NeuronLedgerError as refusal:
                return f"{type(refusal).__name__} {refusal.exit_code}"
        return "applied"

    outcomes = together(writer, WRITERS)

    assert outcomes.count("applied") == 1
    assert all(outcome.endswith(" 3") for outcome in outcomes if outcome != "applied"), outcomes
    assert scenario.states() == ["applied", "applied"]
    now = scenario.claims()
    assert all(now[module][row] == patch for module, rows in held.items() for row, patch in rows.items())
    gained = {module: {row for row, patch in rows.items() if patch == 2} for module, rows in now.items()}
    assert {module: rows for module, rows in gained.items() if rows} == scenario.artifact_rows(2)
    require_only_rows_differ(scenario.trio.subject, scenario.working, now)
    assert scenario.workspace.store.leftovers() == ()
    with workspace.registry.read() as session:
        recorded = list(events(session))
        assert list(check_ledger(workspace.registry.heads.read(), recorded)) == []
    actions = [event.action for event in recorded[before:]]
    assert (actions.count("patch.applying"), actions.count("patch.applied")) == (1, 1)
    scenario.require_sound()

    assert scenario.apply("animals", budget=0.3).state == "applied"
    for _ in range(3):
        scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_whoever_comes_while_a_patch_is_being_written_is_told_to_wait(
    scenarios: Scenarios, trios: Trios, adapter_trios: Trios, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Half-written rows are not taken for weights that somebody changed, and nobody recovers over a living writer."""
    scenario = scenarios(trios() if kind == "full" else adapter_trios(on_aligned=True))
    scenario.apply("weapons")
    plan, other = scenario.plan("animals", budget=0.2), scenario.plan("insults", budget=0.2)
    halfway, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        halfway.set()
        assert go_on.wait(30)

    def just_before(module: ModuleType, attempt: Callable[[], object]) -> Callable[[], object]:
        """An attempt that asked whether the lineage is settled just before the other patch began."""

        def attempt_that_asked_too_early() -> None:
            asks = chain([lambda *_: None], repeat(module.require_settled))

            def ask(*of: Any) -> None:
                next(asks)(*of)

            with monkeypatch.context() as patch:
                patch.setattr(module, "require_settled", ask)
                attempt()

        return attempt_that_asked_too_early

    attempts: dict[str, Callable[[], object]] = {
        "apply": lambda: apply_patch(scenario.workspace, other),
        "plan": lambda: scenario.plan("animals"),
        "plan just before": just_before(lineage_state, lambda: scenario.plan("animals")),
        "revert": scenario.revert,
        "revert just before": just_before(patch_transactions, scenario.revert),
        "recover": lambda: recover(scenario.workspace),
    }
    told: dict[str, tuple[str, int]] = {}
    kinds: dict[str, Kind] = {"full": "write", "adapter": "rename"}
    with ThreadPoolExecutor(1) as pool, struck_by(Fault(scenario.working, kinds[kind], 2, wait)):
        writing = pool.submit(apply_patch, scenario.workspace, plan)
        assert halfway.wait(30)
        for name, attempt in attempts.items():
            with pytest.raises(NeuronLedgerError) as refusal:
                attempt()
            told[name] = (type(refusal.value).__name__, refusal.value.exit_code)
        go_on.set()
        assert writing.result().state == "applied"
    assert told == dict.fromkeys(attempts, ("LockedError", 3))
    scenario.require_sound()
