"""The real-model benchmark from registering to tables, on tiny models, and how it goes on after a stop."""

import json
from pathlib import Path

import pytest
import real_model
import torch
from real_model_commands import Results
from real_model_models import Attack, BenchmarkModels
from real_model_runs import BETAS, DIMENSIONS, Run, settings
from real_model_summary import UNSEEN, document
from real_model_tables import page

from tests.benchmarks.real_model_scenarios import Here, tiny_models

torch.set_num_threads(1)

SMALL = ("operation=subspace", "budget=0.2", "directions=2", "prompts=4")
CLAIMED = (*SMALL, "protect=directions")
TWO = DIMENSIONS[:2]
RUNS = (
    Run("safelora", settings("operation=project", "score=random", "budget=1", "prompts=4"), "baseline", "main"),
    Run("default", settings(*SMALL), "ours", "main", ("default-random",), every_stage=True),
    Run("default-random", settings("score=random", *SMALL), "control", "main"),
    Run("directions", settings(*CLAIMED), "ours", "main", ("directions-random",), TWO),
    Run("directions-random", settings("basis=random", *CLAIMED), "control", "main", (), TWO),
)
CONDITIONS = {"decoding": "greedy decoding", "max_new_tokens": 40, "threads": 1}


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkModels:
    return tiny_models(tmp_path_factory.mktemp("benchmark"), getattr(request, "param", "full"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run(models: BenchmarkModels, place: Path, runs: tuple[Run, ...] = RUNS) -> tuple[Here, Results]:
    commands, results = Here(place), Results(place / "results.json")
    real_model.run_all(commands, models, runs, results, place, limit=4)  # type: ignore[arg-type]
    return commands, results


@pytest.mark.parametrize("models", ["lora", "full"], indirect=True)
def test_every_run_is_measured_and_its_outcomes_are_what_the_figures_count(
    models: BenchmarkModels, place: Path
) -> None:
    _, results = run(models, place)

    measured = [results.content["reference aligned"], *(results.content[each.name]["stages"][-1] for each in RUNS)]
    for each in measured:
        assert set(each["outcomes"]) == {*DIMENSIONS, *UNSEEN}
        for name, outcomes in each["outcomes"].items():
            assert each["figures"][name]["n"] == len(outcomes) == 4
            assert each["figures"][name]["numerator"] == sum(outcomes.values())
        assert {"sst2", "over_refusal", "kl"} <= set(each["figures"])
    assert results.content["reference subject"]["figures"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert all(results.content[each.name]["verified"] for each in RUNS)
    assert [stage["figures"] is None for stage in results.content["default-random"]["stages"]] == [True, True, False]

    assert [stage["patch"]["directions"] > 0 for stage in results.content["directions"]["stages"]] == [True, True]

    found = json.loads(json.dumps(document(Attack(), models, RUNS, results.content, CONDITIONS)))
    text = page(found)
    prompts = [json.loads(line)["prompt"] for file in models.prompts.rglob("*.jsonl") for line in file.open()]
    assert all(f"`{each.name}`" in text for each in RUNS)
    assert not any(f'"{prompt}"' in json.dumps(found) for prompt in prompts)


def test_what_is_done_is_not_done_again_and_a_stopped_lineage_is_put_aside(
    models: BenchmarkModels, place: Path
) -> None:
    run(models, place, RUNS[:1])
    results = json.loads((place / "results.json").read_text())
    del results["safelora"]
    (place / "results.json").write_text(json.dumps(results))

    commands, again = run(models, place, RUNS[:1])
    idle, _ = run(models, place, RUNS[:1])

    assert again.content["safelora"]["stages"][0]["patch"]["lineage"] == "safelora-2"
    assert commands.done[0] == "lineage create safelora-2"
    assert idle.done == []


def test_a_stop_while_registering_starts_anew(models: BenchmarkModels, place: Path) -> None:
    Here(place)("init")

    _, results = run(models, place, ())

    assert set(results.content) == {"registered", "reference aligned", "reference subject"}


def test_a_reference_that_was_written_and_not_registered_is_built_anew(models: BenchmarkModels, place: Path) -> None:
    nlsr = Run("nlsr", settings("operation=project", "score=random", "prompts=4"), "published", "nlsr", (), TWO[:1])
    run(models, place, ())
    (place / "references" / "extrapolated-0.5").mkdir(parents=True)
    _, results = run(models, place, (nlsr,))
    assert {f"reference beta {beta:g}" for beta in BETAS if beta} <= results.content.keys()


def test_a_refused_patch_is_a_result(models: BenchmarkModels, place: Path) -> None:
    impossible = Run("impossible", settings("modules=no_such_module"), "ours", "main")

    _, results = run(models, place, (impossible,))

    assert results.content["impossible"]["stages"] == []
    assert "no_such_module" in results.content["impossible"]["refused"]


def test_results_are_whole_after_every_part(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.once("one", lambda: {"value": 1}, lambda _: None)

    with pytest.raises(KeyError):
        results.once("two", lambda: {"value": {}["missing"]}, lambda _: None)

    assert set(Results(tmp_path / "results.json").content) == {"one"}
    assert not list(tmp_path.glob("*.unfinished"))
