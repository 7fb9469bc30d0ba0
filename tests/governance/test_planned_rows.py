"""The rows of a planned patch are the same bytes on every machine, and of what fails the first is named."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from algorithms import parallel
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.errors import NonFiniteError
from algorithms.operations import RowEdit, RowEditor
from governance import row_files
from governance.errors import WeightsChangedError
from governance.planning import PatchPlan, prepared
from governance.row_figures import ModuleOutcome
from governance.row_files import Block
from governance.tensor_file import TensorFileWriter, TensorSpec
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import flip_byte
from tests.governance.scenarios import Scenario, Trio

FORMS: Mapping[str, Callable[[Trios, Trios], Trio]] = {
    "shards": lambda full, _: full(shard_size="6KB"),
    "stored transposed": lambda full, _: full(family="gpt2"),
    "lora": lambda _, adapters: adapters(on_aligned=False),
}
EDITS: Mapping[str, dict[str, Any]] = {
    "restore": {"budget": 0.3},
    "subspace": {"budget": 0.3, "operation": "subspace"},
    "project": {"budget": 0.3, "operation": "project"},
}


def computed(scenario: Scenario, plan: PatchPlan) -> tuple[bytes, tuple[ModuleOutcome, ...]]:
    """The artifact of a plan, and what its rows came to."""
    with prepared(scenario.workspace, plan) as ready:
        return ready.artifact.read_bytes(), ready.outcomes


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("settings", EDITS.values(), ids=EDITS)
def test_rows_do_not_depend_on_threads(
    trios: Trios,
    adapter_trios: Trios,
    scenarios: Scenarios,
    monkeypatch: pytest.MonkeyPatch,
    form: Callable[[Trios, Trios], Trio],
    settings: Mapping[str, Any],
) -> None:
    scenario = scenarios(form(trios, adapter_trios))
    plan = scenario.plan("animals", **settings)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            monkeypatch.setattr(parallel, "THREADS", threads)
            if settings.get("operation") != "project":  # whose products torch divides among its threads
                torch.set_num_threads(threads)
            found.append(computed(scenario, plan))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert len(plan.touched) > 1
    assert [outcome.module for outcome in found[0][1]] == [module.module for module in plan.touched]


def test_of_several_modules_whose_rows_cannot_be_computed_the_first_is_named(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = scenario.plan("animals", budget=0.3)
    second, later = (module.module for module in plan.touched[1:3])
    edits = RowEditor.edits

    def damaged(editor: RowEditor) -> Iterator[RowEdit]:
        if editor.module.name in {second, later}:
            raise NonFiniteError(f"The computed edit of {editor.module.name} holds NaN", "Check the checkpoint")
        yield from edits(editor)

    monkeypatch.setattr(RowEditor, "edits", damaged)
    with pytest.raises(NonFiniteError, match=f"of {second} holds"), prepared(scenario.workspace, plan):
        pass
    assert scenario.workspace.store.leftovers() == ()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tensor_is_checked_while_the_rows_of_the_next_module_are_computed(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(parallel, "THREADS", threads)
    plan = scenario.plan("animals", budget=0.3)
    checkpoint = Checkpoint.open(scenario.working)
    first, last = plan.touched[0], plan.touched[-1]
    begins, read = checkpoint.stored(f"{first.module}.weight").begin, Event()
    edits, blocks = RowEditor.edits, row_files.tensor_blocks

    def noted(directory: Path, stored: StoredTensor) -> Iterator[Block]:
        yield from blocks(directory, stored)
        if stored.begin == begins:
            read.set()

    def waiting(editor: RowEditor) -> Iterator[RowEdit]:
        if editor.module.name == last.module:
            assert read.wait(10)
        yield from edits(editor)

    monkeypatch.setattr(row_files, "tensor_blocks", noted)
    monkeypatch.setattr(RowEditor, "edits", waiting)
    with prepared(scenario.workspace, plan) as ready:
        assert list(ready.expected) == [f"{module.module}.weight" for module in plan.touched]


def test_rows_that_cannot_be_computed_are_told_though_a_tensor_is_not_what_was_recorded(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = scenario.plan("animals", budget=0.3)
    edits = RowEditor.edits

    def damaged(editor: RowEditor) -> Iterator[RowEdit]:
        if editor.module.name == plan.touched[-1].module:
            raise NonFiniteError(f"The computed edit of {editor.module.name} holds NaN", "Check the checkpoint")
        yield from edits(editor)

    stored = Checkpoint.open(scenario.working).stored(f"{plan.touched[0].module}.weight")
    flip_byte(scenario.working / stored.file, stored.begin)
    with pytest.raises(WeightsChangedError, match=f"^{stored.name} of the working checkpoint"):
        computed(scenario, plan)
    monkeypatch.setattr(RowEditor, "edits", damaged)
    with pytest.raises(NonFiniteError, match=f"of {plan.touched[-1].module} holds"):
        computed(scenario, plan)
    assert scenario.workspace.store.leftovers() == ()


def test_torch_computes_rows_on_one_core_and_on_all_again_afterwards(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = scenario.plan("animals", budget=0.3)
    seen: list[int] = []
    edits = RowEditor.edits

    def noted(editor: RowEditor) -> Iterator[RowEdit]:
        seen.append(torch.get_num_threads())
        yield from edits(editor)

    monkeypatch.setattr(RowEditor, "edits", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        computed(scenario, plan)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_writer_that_is_closed_writes_to_no_other_file(tmp_path: Path) -> None:
    """The closed file's number may be another's by then."""
    with TensorFileWriter(tmp_path / "rows", [TensorSpec("a", "F32", (2, 2))], {}) as writer:
        writer.put("a", torch.ones(2, 2))
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.put("a", torch.zeros(2, 2))
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)
