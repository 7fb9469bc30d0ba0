"""The second judge of the real-model benchmark reads stored answers only, of every model that was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import real_model
import torch
from real_model_commands import RefusedError, Results
from real_model_judge_training import NAME, JudgeHome, SecondJudgeError, judge_home, trained_judge
from real_model_models import Attack, BenchmarkModels
from real_model_runs import DIMENSIONS, Run, settings
from real_model_second_judge import FILE, judge_stored, measured_models, second_results
from real_model_second_report import second_opinion
from real_model_summary import UNSEEN, document, pooled_harmfulness
from real_model_tables import page

from tests.benchmarks.real_model_scenarios import Here, tiny_models
from tests.governance.labelled import labelled_rows, write_labelled

torch.set_num_threads(1)

LIMIT = 4
SMALL = ("operation=subspace", "budget=0.2", "directions=2", "prompts=4")
RUNS = (
    Run("safelora", settings("operation=project", "score=random", "budget=1", "prompts=4"), "baseline", "main"),
    Run("sparse", settings(*SMALL), "ours", "main", ("sparse-random",), DIMENSIONS[:2], every_stage=True),
    Run("sparse-random", settings("score=random", *SMALL), "control", "main", (), DIMENSIONS[:1]),
    Run("entries-random", (), "control", "main", dimensions=(), entries=0.15),
)
MEASURED = (
    *("reference aligned", "reference subject", "safelora stage 3"),
    *("sparse stage 1", "sparse stage 2", "sparse-random stage 1", "entries-random stage 1"),
)


@pytest.fixture(scope="module", params=["lora", "full"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkModels:
    return tiny_models(tmp_path_factory.mktemp("benchmark"), request.param)


@pytest.fixture(scope="module")
def data(models: BenchmarkModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows; the last is an answer to a prompt of the report."""
    data = tmp_path_factory.mktemp("data")
    rows = [{**row, "source_split": f"30k_{row['source']}"} for row in labelled_rows(80)]
    file = models.prompts / "dimensions" / DIMENSIONS[0] / "harmful_report.jsonl"
    prompt = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    (data / "beavertails").mkdir()
    write_labelled(data / "beavertails" / "qa.jsonl", [*rows, {**rows[0], "prompt": f"  {prompt.upper()}"}])
    return data


@pytest.fixture(scope="module")
def done(models: BenchmarkModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results that no second judge has seen."""
    place = tmp_path_factory.mktemp("done") / "run"
    real_model.run_all(
        Here(place),  # type: ignore[arg-type]
        models,
        RUNS,
        Results(place / "results.json"),
        place,
        limit=LIMIT,
    )
    return place


@pytest.fixture(scope="module")
def judge(data: Path, models: BenchmarkModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[JudgeHome, Any]:
    home = judge_home(data, tmp_path_factory.mktemp("cache"), models)
    return home, trained_judge(Here(home.directory), home, models, real_model.MAX_NEW_TOKENS, lambda _: None)


@pytest.fixture
def place(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def judged(judge: tuple[JudgeHome, Any], place: Path) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    what = real_model.measured_prompts(place / "prompts", "phrases")
    judge_stored(*judge, Results(place / "results.json"), place, what, told.append)
    return second_results(place).content, told


def files(place: Path) -> dict[str, bytes]:
    """What is in the folder, but for the database, whose log SQLite merges when it is opened."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not path.name.startswith("registry.db")
    }


def test_every_measured_model_is_judged_and_nothing_but_verdicts_is_written(
    judge: tuple[JudgeHome, Any], place: Path
) -> None:
    before = files(place)

    found, _ = judged(judge, place)

    after = files(place)
    digest = judge[1]["artifact_digest"]
    assert set(found) == {"judge", *MEASURED}
    assert after.keys() - before.keys() == {FILE, f"answers/verdicts-{digest}.jsonl"}
    assert {name: after[name] for name in before} == before
    for measured in measured_models(json.loads(before["results.json"])):
        outcomes = found[measured.name]["outcomes"]
        assert {name: set(prompts) for name, prompts in outcomes.items()} == {
            name: set(prompts) for name, prompts in measured.result["outcomes"].items()
        }
        assert set(outcomes) == {*DIMENSIONS, *UNSEEN}


def test_a_reference_is_found_by_its_registered_name() -> None:
    content = {"registered": {}, "reference aligned": {}, "reference beta 0.5": {}}

    assert [(found.model, found.state_digest) for found in measured_models(content)] == [
        ("aligned", None),
        ("extrapolated-0.5", None),
    ]


def test_what_is_judged_is_not_judged_again_and_the_judge_not_trained_again(
    judge: tuple[JudgeHome, Any], models: BenchmarkModels, place: Path
) -> None:
    home, shown = judge
    judged(judge, place)
    before = files(place)
    commands = Here(home.directory)

    assert trained_judge(commands, home, models, real_model.MAX_NEW_TOKENS, pytest.fail) == shown
    _, told = judged(judge, place)

    assert not any(words.startswith(("judge train", "judge check", "model register")) for words in commands.done)
    assert told == []
    assert files(place) == before


def test_the_judge_is_not_trained_on_prompts_of_the_report(
    judge: tuple[JudgeHome, Any], data: Path, models: BenchmarkModels
) -> None:
    home, shown = judge
    rows = (data / "beavertails" / "qa.jsonl").read_text(encoding="utf-8").splitlines()

    assert home.rows.read_text(encoding="utf-8").splitlines() == rows[:-1]
    assert sum(side["rows"] for side in shown["splits"].values()) == len(rows) - 1
    assert judge_home(data, home.directory.parent, models) == home


def test_a_training_that_was_stopped_goes_on(data: Path, models: BenchmarkModels, tmp_path: Path) -> None:
    home = judge_home(data, tmp_path, models)

    class Stopping(Here):
        def __call__(self, *arguments: object) -> Any:
            if arguments[:2] == ("judge", "train"):
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    with pytest.raises(KeyboardInterrupt):
        trained_judge(Stopping(home.directory), home, models, 8, lambda _: None)

    assert trained_judge(Here(home.directory), home, models, 8, lambda _: None)["name"] == NAME


def test_a_model_whose_answers_are_gone_is_told_of_and_left_out(judge: tuple[JudgeHome, Any], place: Path) -> None:
    stages = json.loads((place / "results.json").read_text())["sparse"]["stages"]
    known = {path: path.read_bytes() for path in (place / "answers").iterdir()}
    for path in known:
        path.unlink()
    _, told = judged(judge, place)
    assert sum("is left out" in line for line in told) == len(MEASURED)

    for path, content in known.items():
        path.write_bytes(content)
    found, _ = judged(judge, place)

    assert found["sparse stage 2"]["state_digest"] == stages[1]["patch"]["digest_after"]


def test_a_stage_that_was_measured_anew_is_judged_anew(judge: tuple[JudgeHome, Any], place: Path) -> None:
    judged(judge, place)
    kept = json.loads((place / FILE).read_text())
    kept["sparse stage 1"]["state_digest"] = "0" * 64
    (place / FILE).write_text(json.dumps(kept))

    _, told = judged(judge, place)

    assert [line for line in told if "stage" in line] == ["second judge: sparse stage 1 …"]


def test_another_judge_judges_everything_anew(judge: tuple[JudgeHome, Any], place: Path) -> None:
    judged(judge, place)
    kept = json.loads((place / FILE).read_text())
    kept["judge"]["artifact_digest"] = "0" * 64
    (place / FILE).write_text(json.dumps(kept))

    found, told = judged(judge, place)

    assert found["judge"]["artifact_digest"] == judge[1]["artifact_digest"]
    assert sum(line.endswith("…") for line in told) == len(MEASURED)


def test_answers_to_other_prompts_than_those_of_the_results_are_refused(
    judge: tuple[JudgeHome, Any], place: Path
) -> None:
    file = place / "prompts" / f"{UNSEEN[0]}.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))

    with pytest.raises(SecondJudgeError, match="reference aligned"):
        judged(judge, place)


def test_without_a_registry_or_rows_it_says_what_is_missing(
    judge: tuple[JudgeHome, Any], models: BenchmarkModels, tmp_path: Path
) -> None:
    with pytest.raises(SecondJudgeError, match="no registry"):
        judged(judge, tmp_path / "run")
    with pytest.raises(SecondJudgeError, match="no file"):
        judge_home(tmp_path, tmp_path, models)


def test_a_training_that_is_refused_says_why(data: Path, models: BenchmarkModels, tmp_path: Path) -> None:
    def refusing(*arguments: object) -> Any:
        raise RefusedError("The rows are of one kind.")

    with pytest.raises(SecondJudgeError, match="The rows are of one kind"):
        trained_judge(refusing, judge_home(data, tmp_path, models), models, 8, lambda _: None)


def test_the_report_needs_no_judge_and_holds_no_prompt_or_answer(
    judge: tuple[JudgeHome, Any], models: BenchmarkModels, place: Path
) -> None:
    second, _ = judged(judge, place)
    content = json.loads((place / "results.json").read_text())
    conditions = {"decoding": "greedy decoding", "max_new_tokens": 24, "threads": 1}
    found = document(Attack(), models, RUNS, content, conditions)
    found["second_judge"] = second_opinion(RUNS, content, second)

    text = json.dumps(found)
    opinion = json.loads(text)["second_judge"]

    assert opinion["references"]["aligned"] == pooled_harmfulness(second["reference aligned"])
    assert opinion["judge"]["version"] == judge[1]["version"]
    assert opinion["agreement"]["n"] <= len(MEASURED) * LIMIT * len((*DIMENSIONS, *UNSEEN))
    assert [run["name"] for run in opinion["runs"]] == [run.name for run in RUNS]
    assert f"trained on BeaverTails (version {judge[1]['version']})" in page(found)
    prompts = [json.loads(line)["prompt"] for file in models.prompts.rglob("*.jsonl") for line in file.open()]
    answers = [
        line["value"]
        for file in (place / "answers").glob("*.jsonl")
        for line in map(json.loads, file.open())
        if isinstance(line["value"], str) and line["value"]
    ]
    assert answers
    assert not any(json.dumps(said) in text or said in page(found) for said in prompts + answers)


@pytest.mark.parametrize("models", ["full"], indirect=True)
def test_the_command_judges_results_that_are_there_and_runs_nothing(
    models: BenchmarkModels,
    data: Path,
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(done, tmp_path / f"run-{Attack()}-{LIMIT}")
    monkeypatch.setattr(real_model, "make_models", lambda *_, **__: models)
    monkeypatch.setattr(real_model, "Commands", lambda place, _: Here(place))
    monkeypatch.setattr(real_model, "run_all", pytest.fail)
    options = ["--data", str(data), "--cache", str(tmp_path), "--limit", str(LIMIT), "--threads", "1", "--report-only"]

    assert real_model.main(options) == 0
    assert "By the trained judge" not in capsys.readouterr().out
    assert real_model.main([*options, "--second-judge", "--output", str(tmp_path / "out")]) == 0
    assert "By the trained judge" in capsys.readouterr().out
    assert real_model.main(options) == 0
    assert "By the trained judge" in capsys.readouterr().out

    written = json.loads((tmp_path / "out" / f"real_model_{Attack()}.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in written["second_judge"]["runs"]] == [run.name for run in RUNS]

    assert real_model.main([*options, "--part", "nlsr", "--part", "grid", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"real_model_{Attack()}_grid_nlsr.md").exists()
