"""What the second judge's outcomes conclude: the same figures as by the first, and how far the two agree."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from real_model_runs import Run
from real_model_second_judge import measured_models, stage_name
from real_model_summary import REFERENCES, paired_tests, pooled_harmfulness, recoveries, reference_name

from algorithms.rates import agreement

_JUDGE = ("name", "version", "artifact_digest", "data_digest", "encoder_digest", "splits")


def second_opinion(runs: Sequence[Run], content: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of the document that is by the second judge.

    Args:
        runs: the table; what the second judge has not judged is left out.
        content: results by name, as `real_model.py` keeps them.
        second: what `real_model_second_judge.judge_stored` keeps.

    Returns:
        None where it has not judged both references.
    """
    again = _judged_again(content, second)
    if any(reference_name(model) not in again for model in REFERENCES):
        return None
    references = {model: again[reference_name(model)] for model in REFERENCES}
    extrapolated = {name: pooled_harmfulness(again[name]) for name in again if name.startswith("reference beta")}
    judge = second["judge"]
    seconds = [entry["seconds"] for name, entry in second.items() if name != "judge"]
    overall = [figure for figure in judge["figures"] if figure["category"] is None]
    cut = [figure for figure in judge["cut"]["figures"] if figure["category"] is None]
    return {
        "judge": {key: judge[key] for key in _JUDGE}
        | {"figures": overall, "cut": {"tokens": judge["cut"]["tokens"], "figures": cut}},
        "seconds_per_model": {"median": median(seconds), "most": max(seconds)},
        "agreement": _agreement(content, second),
        "references": {model: pooled_harmfulness(measured) for model, measured in references.items()} | extrapolated,
        "runs": [_run(run, again, references) for run in runs if _judged_to_its_end(again.get(run.name))],
    }


def _judged_again(content: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the second judge's outcomes in the place of the first's; what has none counts as unmeasured."""
    again: dict[str, Any] = {}
    for name, result in content.items():
        if "stages" in result:
            stages = []
            for number, stage in enumerate(result["stages"]):
                kept = second.get(stage_name(name, number), {})
                known = stage["figures"] is not None and kept.get("state_digest") == stage["patch"]["digest_after"]
                stages.append({**stage, "outcomes": kept["outcomes"]} if known else {**stage, "figures": None})
            again[name] = {**result, "stages": stages}
        elif name in second:
            again[name] = {**result, "outcomes": second[name]["outcomes"]}
    return again


def _judged_to_its_end(result: Mapping[str, Any] | None) -> bool:
    return bool(result and result["stages"] and result["stages"][-1]["figures"] is not None)


def _run(run: Run, again: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, Any]:
    stages = [
        {
            "dimension": stage["dimension"],
            "harmfulness": pooled_harmfulness(stage),
            "recovery": recoveries(stage, references),
        }
        for stage in again[run.name]["stages"]
        if stage["figures"] is not None
    ]
    return {"name": run.name, "part": run.part, "stages": stages, "tests": paired_tests(run, again)}


def _agreement(content: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement on all stored answers; an answer of one model to one prompt counts once."""
    first_of: dict[tuple[str, str], bool] = {}
    second_of: dict[tuple[str, str], bool] = {}
    for measured in measured_models(content):
        kept = second.get(measured.name)
        if kept is None or measured.state_digest not in {None, kept["state_digest"]}:
            continue
        for name, outcomes in measured.result["outcomes"].items():
            for prompt, harmful in outcomes.items():
                key = (kept["state_digest"], prompt)
                first_of[key], second_of[key] = harmful, kept["outcomes"][name][prompt]
    ones, others = list(first_of.values()), list(second_of.values())
    pairs = list(zip(ones, others, strict=True))
    return {
        **asdict(agreement(ones, others)),
        "both": pairs.count((True, True)),
        "only_first": pairs.count((True, False)),
        "only_second": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
    }
