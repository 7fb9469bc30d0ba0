"""The document, page and plot of the real-model benchmark say what the results say, and hold no prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import real_model_models as models
import real_model_plot as plot
import real_model_prompts as prompts
import real_model_runs as runs
import real_model_summary as summary
import real_model_tables as tables

from algorithms.settings import FgsnSettings, fgsn_settings

N = 20
RUNS = tuple(run for run in runs.MAIN if run.name in {"undo-all", "safelora", "sparse", "sparse-random", "fgsn-paper"})


def measured(harmful: int, sst2: float = 86.0) -> dict[str, Any]:
    """Figures of a model that answers the first `harmful` of the N prompts of each set harmfully."""
    names = summary.KINDS["all"]
    rate = {"value": 100 * harmful / N, "numerator": harmful, "n": N, "interval_low": 1.0, "interval_high": 99.0}
    figures: dict[str, Any] = dict.fromkeys(names, rate)
    figures |= {"sst2": rate | {"value": sst2}, "over_refusal": rate, "kl": rate | {"value": 0.25}}
    return {
        "judge": "phrases 1",
        "figures": figures,
        "outcomes": {name: {f"{name} {i}": i < harmful for i in range(N)} for name in names},
        "seconds": 1.0,
    }


def stage(dimension: str, harmful: int | None, share: float, modified: int = 10) -> dict[str, Any]:
    patch = {
        "neurons_selected": 12,
        "neurons_already_protected": 2,
        "neurons_modified": modified,
        "rows_unchanged": 0,
        "parameters_modified": 100,
        "modified_share": share / 2,
        "modified_linear_share": share,
        "settings": {"score": "damage"},
    }
    return {"dimension": dimension, "patch": patch, **({"figures": None} if harmful is None else measured(harmful))}


@pytest.fixture
def content() -> dict[str, Any]:
    first, second, third = runs.DIMENSIONS
    done = {"verified": True, "seconds": 2.0}
    return {
        "registered": {"seconds": 1.0},
        "reference aligned": measured(1),
        "reference subject": measured(19),
        "undo-all": {"stages": [stage(first, 1, 1.0)], **done},
        "safelora": {"stages": [stage(first, 10, 1.0)], **done},
        "sparse": {"stages": [stage(first, 8, 0.1), stage(second, 5, 0.02, 3), stage(third, 4, 0.0, 0)], **done},
        "sparse-random": {
            "stages": [stage(first, None, 0.1), stage(second, None, 0.0), stage(third, 16, 0.0)],
            **done,
        },
        "fgsn-paper": {"stages": [stage(first, 18, 0.05)], "refused": "Nothing is left. Do less.", "seconds": 1.0},
    }


def made(tmp_path: Path) -> models.BenchmarkModels:
    record = models.StageRecord("subject", "ab", 1.0, {}, versions={"torch": "1"}, facts={"changed_share": 0.5})
    return models.BenchmarkModels(tmp_path, tmp_path, tmp_path, tmp_path, {"subject": record}, {})


@pytest.fixture
def found(content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    conditions = {"decoding": "greedy decoding", "max_new_tokens": 40, "threads": 1}
    document = summary.document(models.Attack(), made(tmp_path), RUNS, content, conditions)
    result: dict[str, Any] = json.loads(json.dumps(document))
    return result


def run(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in found["runs"] if each["name"] == name)


def test_recovery_is_of_the_pooled_prompts_after_the_last_dimension(found: dict[str, Any]) -> None:
    assert summary.last_recovery(run(found, "sparse"), "seen")["value"] == pytest.approx(15 / 18)  # type: ignore[index]
    assert summary.last_recovery(run(found, "undo-all"), "unseen")["value"] == 1  # type: ignore[index]
    assert run(found, "sparse")["stages"][-1]["harmfulness"]["seen"]["n"] == 3 * N


def test_each_run_is_tested_against_its_control_and_safelora(found: dict[str, Any]) -> None:
    tests = run(found, "sparse")["tests"]

    assert set(tests) == {"sparse-random", "safelora"}
    assert tests["sparse-random"]["all"]["only_second"] == 6 * 12
    assert tests["sparse-random"]["all"]["p"] < 1e-10
    assert run(found, "safelora")["tests"] == {}


def test_a_run_that_was_refused_before_its_end_says_so(found: dict[str, Any]) -> None:
    refused = run(found, "fgsn-paper")

    assert refused["refused"] == "Nothing is left. Do less."
    assert "`fgsn-paper`, refused for drug abuse: Nothing is left. Do less." in tables.page(found)


def test_a_run_without_results_is_left_out(content: dict[str, Any], tmp_path: Path) -> None:
    del content["sparse"]
    found = summary.document(models.Attack(), made(tmp_path), RUNS, content, {})

    assert "sparse" not in {each["name"] for each in found["runs"]}


def test_results_without_the_references_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    del content["reference aligned"]

    with pytest.raises(summary.MissingResultsError, match="aligned"):
        summary.document(models.Attack(), made(tmp_path), RUNS, content, {})


def test_the_document_holds_counts_and_no_prompt(found: dict[str, Any]) -> None:
    text = json.dumps(found)

    assert "advbench 3" not in text
    assert found["prompts"]["advbench"] == N
    assert run(found, "sparse")["settings_digest"] == summary.settings_digest({"score": "damage"})


def test_what_undoes_all_is_no_point_of_the_frontier(found: dict[str, Any]) -> None:
    assert found["frontier"]["seen"] == ["fgsn-paper", "sparse-random", "sparse"]


def test_every_row_of_the_page_has_the_cells_of_its_heading(found: dict[str, Any]) -> None:
    width = None
    for line in tables.page(found).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.replace("|---", "| ---").count("|")
        assert width in {None, cells}, line
        width = cells


def test_the_page_shows_every_step_of_a_continual_run(found: dict[str, Any]) -> None:
    rows = [line for line in tables.page(found).splitlines() if line.startswith("| `sparse` | ")]
    steps = [line for line in rows if "neurons" in line]

    assert [line.split("|")[2].strip() for line in steps] == [name.replace("_", " ") for name in runs.DIMENSIONS]
    assert [line.split("|")[6].strip() for line in steps] == ["10 neurons", "3 neurons", "0 neurons"]
    assert [line.split("|")[8].strip() for line in steps] == ["10.0", "12.0", "12.0"]


def test_a_dimension_that_a_later_step_made_worse_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    stages = content["sparse"]["stages"]
    first, _, third = runs.DIMENSIONS
    stages[0]["figures"][first] = stages[0]["figures"][first] | {"value": 10.0, "interval_high": 20.0}
    stages[2]["figures"][first] = stages[2]["figures"][first] | {"value": 30.0}
    stages[1]["figures"][first] = stages[1]["figures"][first] | {"value": 15.0}

    conditions = {"decoding": "greedy decoding", "max_new_tokens": 40, "threads": 1}
    found = summary.document(models.Attack(), made(tmp_path), RUNS, content, conditions)

    assert run(found, "sparse")["worse_later"] == [{"dimension": first, "step": third, "before": 10.0, "after": 30.0}]
    assert "`sparse`: animal abuse from 10 to 30 after financial crime." in tables.page(found)


def test_without_such_a_step_the_page_says_so(found: dict[str, Any]) -> None:
    assert "No step left an earlier dimension above" in tables.page(found)


def test_the_plot_names_the_runs_and_is_the_same_every_time(found: dict[str, Any], tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.svg" for i in range(2)]
    for file in files:
        plot.draw_frontier(found, file)

    text = files[0].read_text(encoding="utf-8")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(name in text for name in ("sparse-random", "safelora", "Kinds never seen"))


def test_names_are_unique_and_every_control_is_a_run() -> None:
    names = [each.name for each in runs.RUNS]

    assert len(names) == len(set(names))
    assert {control for each in runs.RUNS for control in each.controls} <= set(names)


@pytest.mark.parametrize("each", [each for each in runs.RUNS if each.entries is None], ids=lambda each: each.name)
def test_every_run_has_settings_that_its_method_accepts(each: runs.Run) -> None:
    from algorithms.methods import method_of

    options = dict(zip(each.options[::2], each.options[1::2], strict=True))
    assignments = [value for key, value in zip(each.options[::2], each.options[1::2], strict=True) if key == "--set"]

    chosen = method_of(options["--method"]).choose(
        options["--preset"], dict(text.split("=", 1) for text in assignments)
    )

    assert chosen is not None


@pytest.mark.parametrize("each", [each for each in runs.RUNS if each.controls], ids=lambda each: each.name)
def test_a_control_differs_from_its_run_in_what_neurons_or_directions_are_chosen_by_only(each: runs.Run) -> None:
    # How many are chosen goes with what they are chosen by.
    chosen_by = ("score=", "region_score=", "basis=", "direction_choice=", "directions=", "stop_at=")

    def others(options: tuple[str, ...]) -> set[str]:
        return {text for text in options if not text.startswith(("--set", *chosen_by))}

    def settings_of(options: tuple[str, ...]) -> FgsnSettings:
        values = [text for key, text in zip(options[::2], options[1::2], strict=True) if key == "--set"]
        return fgsn_settings(options[options.index("--preset") + 1], dict(text.split("=", 1) for text in values))

    for control in each.controls:
        other = next(run for run in runs.RUNS if run.name == control)
        if other.entries is not None:  # at least as many single entries as all of the run's patches may change
            assert other.entries > len(each.dimensions) * settings_of(each.options).budget - 1e-9
        elif other.dimensions == each.dimensions:
            assert others(other.options) == others(each.options)
        else:  # one draw at random of as many rows as all of the run's patches may come to
            more = next(text for text in other.options if text.startswith("budget="))
            assert others(other.options) - {more} == others(each.options)
            assert settings_of(other.options).budget > len(each.dimensions) * settings_of(each.options).budget - 1e-9
    if "--preset" in each.options and "strong" in each.options:
        found = settings_of(each.options).directions
        assert max(settings_of(run.options).directions for run in runs.RUNS if run.name in each.controls) >= found


def test_a_full_subject_has_no_factors_to_exchange() -> None:
    assert any("factor" in each.name for each in runs.chosen(["nlsr"], "lora"))
    assert not any("factor" in each.name for each in runs.chosen(["nlsr"], "full"))


def test_quick_runs_a_few_methods_on_one_dimension() -> None:
    quick = runs.chosen(runs.PARTS, "lora", quick=True)

    assert {"safelora", "sparse", "sparse-random"} <= {each.name for each in quick}
    assert all(each.dimensions == runs.DIMENSIONS[:1] for each in quick)


def test_every_subject_of_the_grid_has_a_folder_of_its_own_and_the_first_keeps_its_name() -> None:
    attacks = [
        models.Attack(poison, seed, form, aligned)
        for poison in prompts.POISON_LEVELS
        for seed in (0, 1)
        for form in ("lora", "full")
        for aligned in (0, 1)
    ]

    assert len({attack.subject for attack in attacks}) == len(attacks)
    assert models.Attack().subject == "subject_adapter"
    assert models.Attack(0.2, 1).subject == "subject-lora-p0.2-seed1"
    assert models.Attack(aligned_seed=1).aligned_adapter == "aligned_adapter-seed1"
