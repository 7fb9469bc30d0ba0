"""Tasks of the lm-eval harness: what it returns is recorded as it is. The harness itself is replaced here."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli import main
from governance.errors import InputError
from governance.harness import HarnessSettings, read_results
from governance.placement import Placement
from governance.utility import measure_utility
from governance.workspace import Workspace
from registry import queries
from tests.governance.conftest import Trios
from tests.governance.scenarios import Scenario, build, events_of

RESULTS: dict[str, Any] = {
    "results": {
        "choice": {"alias": "choice", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25},
        "sums": {
            "alias": "sums",
            "exact_match,strict-match": 0.0,
            "exact_match_stderr,strict-match": 0.0,
            "exact_match,flexible": 1,
            "exact_match_stderr,flexible": "N/A",
        },
        "group": {"alias": "group", "acc,none": 0.4},
    },
    "n-samples": {"choice": {"original": 9, "effective": 4}, "sums": {"original": 2, "effective": 2}},
    "versions": {"choice": 1.0, "sums": 3},
    "configs": {"choice": {"task": "choice", "doc_to_text": len}, "sums": {"task": "sums"}},
    "n-shot": {"choice": 0, "sums": 5},
}
TASKS = HarnessSettings(("choice", "sums"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A harness that gives `RESULTS`; what it was asked."""
    asked: dict[str, Any] = {}
    package, models, wrapped, tasks = (
        ModuleType(f"lm_eval{name}") for name in ("", ".models", ".models.huggingface", ".tasks")
    )

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            asked["include_path"] = include_path
            self.all_tasks = ["choice", "sums", "broken"]

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        if "broken" in arguments["tasks"]:
            raise OSError("no data\nmore")
        return RESULTS

    package.__version__ = "9.9"  # type: ignore[attr-defined]
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    wrapped.HFLM = lambda **arguments: arguments  # type: ignore[attr-defined]
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    for module in (package, models, wrapped, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_every_metric_of_every_task_is_a_figure() -> None:
    found = {figure.metric: figure for figure in read_results(RESULTS, TASKS, "9.9")}
    assert list(found) == [
        *("lm_eval_choice_acc", "lm_eval_choice_acc_norm"),
        *("lm_eval_sums_exact_match_strict-match", "lm_eval_sums_exact_match_flexible", "lm_eval_group_acc"),
    ]
    accuracy = found["lm_eval_choice_acc"]
    assert (accuracy.value, accuracy.n) == (0.5, 4)
    assert accuracy.interval == pytest.approx((0.304, 0.696), abs=1e-3)
    assert accuracy.generation["harness"] == "lm-eval 9.9"
    assert (accuracy.generation["task_version"], accuracy.generation["num_fewshot"]) == (1.0, 0)
    assert len(accuracy.generation["task_configuration"]) == 64
    assert found["lm_eval_sums_exact_match_flexible"].interval is None
    assert found["lm_eval_group_acc"].n is None
    with pytest.raises(InputError, match="no figure for choice, sums"):
        read_results({"results": {"choice": {"alias": "choice"}}}, TASKS, "9.9")


def test_figures_of_the_harness_are_recorded(
    workspace: Workspace, trios: Trios, prompts: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    scenario = build(workspace, trios(), prompts)
    figures = measure_utility(workspace, "line", "aligned", replace(TASKS, include_path=tmp_path, limit=3, seed=5))
    assert [(figure.stage, figure.unit) for figure in figures] == [("aligned", "lm-eval")] * 5
    assert (asked["include_path"], asked["limit"], asked["fewshot_random_seed"]) == (str(tmp_path), 3, 5)
    assert asked["model"]["device"] == "cpu"
    with workspace.registry.read() as session:
        records = queries.evaluations(session, queries.lineage_id(session, "line"))
    assert [(record.value, record.n, record.prompt_set_id, record.numerator) for record in records] == [
        *((0.5, 4, None, None), (0.25, 4, None, None), (0.0, 2, None, None), (1.0, 2, None, None)),
        (0.4, None, None, None),
    ]
    assert (records[3].interval_low, records[2].interval_low) == (None, 0.0)
    (told,) = [content for action, content in events_of(workspace) if action == "evaluation.recorded"]
    assert [figure["value"] for figure in told["figures"]] == [record.value for record in records]
    scenario.require_sound()


def test_a_figure_says_where_and_in_which_format_the_model_ran(scenario: Scenario, asked: dict[str, Any]) -> None:
    there = replace(scenario.workspace, placement=Placement("auto", "bfloat16"))
    measure_utility(there, "line", "head", TASKS)
    assert next(asked["model"]["pretrained"].parameters()).dtype == torch.bfloat16
    with there.registry.read() as session:
        records = queries.evaluations(session, queries.lineage_id(session, "line"))
    ran = {"dtype": "bfloat16", "device_map": "auto"}
    assert all(ran.items() <= record.generation.items() for record in records)


@pytest.mark.usefixtures("asked")
def test_a_model_of_which_a_part_is_offloaded_is_refused(scenario: Scenario) -> None:
    there = replace(scenario.workspace, placement=Placement({"model": "cpu", "lm_head": "disk"}))
    with pytest.raises(InputError, match=r"lm_head.weight is offloaded"):
        measure_utility(there, "line", "head", TASKS)


def test_tasks_that_cannot_be_run_are_refused_and_that_is_recorded(scenario: Scenario, asked: dict[str, Any]) -> None:
    for tasks, message in ((("choice", "none"), "knows no task none"), (("broken",), r"cannot run broken \(no data\)")):
        with pytest.raises(InputError, match=message):
            measure_utility(scenario.workspace, "line", "head", HarnessSettings(tasks))
        assert scenario.events()[-1][0] == "refused"


def test_without_the_extra_the_command_says_how_to_get_it(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    url = scenario.workspace.registry.url
    done = CliRunner().invoke(main, ["utility", "line", "choice", "--database", url, "--actor", "ada"])
    assert done.exit_code == 2
    assert "pip install 'neuronledger[utility]'" in done.stderr.lower()
