"""Sixteen writers released at once: one patch wins, every other one is told to plan again, and nothing is mixed up."""

from pathlib import Path

import pytest
import torch

from governance.patching import apply_patch
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry.database import Registry
from registry.heads import check_ledger
from registry.ledger import events
from tests.governance.conftest import Trios
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
