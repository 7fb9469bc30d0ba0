"""The document of a real-model benchmark: what its results conclude, as JSON, without a prompt or an answer.

Figures of every measured model, pooled harmfulness and recovery on kinds identified with and kinds never seen, paired
tests against controls and SafeLoRA, and which runs nothing beats.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from real_model_models import Attack, BenchmarkModels
from real_model_prompts import UNSEEN_KINDS
from real_model_runs import DIMENSIONS, SAFELORA, Run
from real_model_statistics import Outcomes, frontier, harmful_rate, mcnemar, pooled, recovery

from governance.metrics import ATTACK_SUCCESS
from neuronledger import NeuronLedgerError

UNSEEN = tuple(UNSEEN_KINDS)
KINDS: Mapping[str, tuple[str, ...]] = {"seen": DIMENSIONS, "unseen": UNSEEN, "all": (*DIMENSIONS, *UNSEEN)}
ALIGNED, FINE_TUNED = "aligned", "subject"
REFERENCES = (ALIGNED, FINE_TUNED)


class MissingResultsError(NeuronLedgerError):
    """What a document must hold was not measured."""


def reference_name(model: str) -> str:
    """Under what a reference's figures are kept among the results."""
    return f"reference {model}"


def document(
    attack: Attack, models: BenchmarkModels, runs: Sequence[Run], content: Mapping[str, Any], conditions: dict[str, Any]
) -> dict[str, Any]:
    """Conclude from the results of the runs that are there.

    Args:
        attack: the subject.
        models: how the models came about.
        runs: the table; those without results are left out.
        content: results by name, as `real_model.py` keeps them.
        conditions: how it was measured: limits, threads, generation.

    Raises:
        MissingResultsError: the aligned or the fine-tuned model was not measured.
    """
    missing = [model for model in REFERENCES if reference_name(model) not in content]
    if missing:
        raise MissingResultsError(f"There are no results of the {missing[0]} model", "Run without --report-only first")
    references = {model: content[reference_name(model)] for model in REFERENCES}
    found = [_run(run, content, references) for run in runs if run.name in content]
    extrapolated = {name: _figures(value) for name, value in content.items() if name.startswith("reference beta")}
    return {
        "model": "SmolLM2-135M-Instruct",
        "attack": asdict(attack),
        "machine": machine(),
        "conditions": {"judge": references[ALIGNED]["judge"], **conditions},
        "prompts": {
            name: figure["n"]
            for name, figure in references[FINE_TUNED]["figures"].items()
            if not name.startswith(ATTACK_SUCCESS)
        },
        "training": {
            name: {"digest": record.digest, "seconds": record.seconds, **record.facts, "versions": record.versions}
            for name, record in models.records.items()
        },
        "references": {model: _figures(value) for model, value in references.items()} | extrapolated,
        "runs": found,
        "frontier": {kinds: _frontier(found, kinds) for kinds in ("seen", "unseen")},
    }


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    libraries = ("torch", "transformers", "peft", "numpy")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in libraries},
    }


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings as canonical JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _run(run: Run, content: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, Any]:
    result = content[run.name]
    stages = [_stage(stage, references) for stage in result["stages"]]
    settings = result["stages"][0]["patch"]["settings"] if result["stages"] else {}
    return {
        "name": run.name,
        "part": run.part,
        "family": run.family,
        "options": list(run.options),
        "settings": settings,
        "settings_digest": settings_digest(settings),
        "dimensions": list(run.dimensions),
        "stages": stages,
        "worse_later": _worse_later(stages),
        "tests": paired_tests(run, content),
        "refused": result.get("refused"),
        "verified": result.get("verified"),
        "seconds": result["seconds"],
    }


def paired_tests(run: Run, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """McNemar's tests of a run after its last dimension, by what it is held against and by kinds.

    Args:
        run: held against its controls and SafeLoRA.
        content: results by name; what has none there, or no outcomes after its last dimension, is left out.
    """
    last = _last_outcomes(content[run.name])
    others = dict.fromkeys([*run.controls, *([SAFELORA] if run.family != "baseline" else [])])
    return {
        name: {kinds: asdict(mcnemar(pooled(last, sets), pooled(other, sets))) for kinds, sets in KINDS.items()}
        for name in others
        if last is not None and name in content and (other := _last_outcomes(content[name])) is not None
    }


_PATCH_COUNTS = (
    *("neurons_selected", "neurons_already_protected", "neurons_modified", "rows_unchanged", "parameters_modified"),
    *("directions", "modified_share", "modified_linear_share"),
)


def _stage(stage: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, Any]:
    counts = {key: stage["patch"][key] for key in _PATCH_COUNTS if key in stage["patch"]}
    if stage["figures"] is None:
        return {"dimension": stage["dimension"], "patch": counts}
    return {
        "dimension": stage["dimension"],
        "patch": counts,
        **_figures(stage),
        "recovery": recoveries(stage, references),
    }


def _worse_later(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Dimensions whose harmfulness after a later step lies above the interval that it had after their own."""
    found = []
    for number, own in enumerate(stages):
        for later in stages[number + 1 :]:
            if "figures" not in own or "figures" not in later:
                continue
            before, after = (stage["figures"][own["dimension"]] for stage in (own, later))
            if after["value"] > before["interval_high"]:
                values = {"before": before["value"], "after": after["value"]}
                found.append({"dimension": own["dimension"], "step": later["dimension"], **values})
    return found


def _figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {"figures": measured["figures"], "harmfulness": pooled_harmfulness(measured)}


def pooled_harmfulness(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Harmfulness in % with its interval, pooled over kinds, of what has `outcomes`."""
    outcomes: Mapping[str, Outcomes] = measured["outcomes"]
    together = {}
    for kinds, sets in KINDS.items():
        rate = harmful_rate(pooled(outcomes, sets))
        together[kinds] = {
            "value": 100 * rate.value,
            "numerator": rate.successes,
            "n": rate.n,
            "interval_low": 100 * rate.low,
            "interval_high": 100 * rate.high,
        }
    return together


def recoveries(stage: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Recovery by kinds, of what has `outcomes`; None where the fine-tuned model is no more harmful."""
    found = {}
    for kinds, sets in KINDS.items():
        fine_tuned, patched, aligned = (
            pooled(measured["outcomes"], sets) for measured in (references[FINE_TUNED], stage, references[ALIGNED])
        )
        back = recovery(fine_tuned, patched, aligned)
        found[kinds] = asdict(back) if back else None
    return found


def _last_outcomes(result: Mapping[str, Any]) -> Mapping[str, Outcomes] | None:
    """Outcomes after the last dimension; None where a patch was refused before."""
    if not result["stages"] or result["stages"][-1]["figures"] is None:
        return None
    outcomes: Mapping[str, Outcomes] = result["stages"][-1]["outcomes"]
    return outcomes


def modified_share(run: Mapping[str, Any], stages: int | None = None) -> float:
    """Linear parameters that a run's patches, or the first of them, modified, in % of all.

    Patches that claim directions write the same rows in turn, so for those it is an upper bound.
    """
    return 100 * min(1.0, sum(stage["patch"]["modified_linear_share"] for stage in run["stages"][:stages]))


def last_recovery(run: Mapping[str, Any], kinds: str) -> dict[str, Any] | None:
    """Recovery after the last dimension, or None where it was not measured."""
    if not run["stages"]:
        return None
    recovered: Mapping[str, Any] = run["stages"][-1].get("recovery") or {}
    return recovered.get(kinds)


def _frontier(runs: Sequence[Mapping[str, Any]], kinds: str) -> list[str]:
    points = [
        (run["name"], modified_share(run), found["value"])
        for run in runs
        if (found := last_recovery(run, kinds)) is not None and run["name"] != "undo-all"
    ]
    return list(frontier(points))
