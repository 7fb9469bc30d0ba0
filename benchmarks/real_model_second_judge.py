"""The second opinion of the real-model benchmark: a trained judge reads the answers that are stored already.

Every measured model is judged: the references and each measured stage of each run. What is known of a model is its
state digest, which its answers are stored under: of a stage the digest after its patch, of a reference the registry's.
A run that is a checkpoint instead of patches has one stage, with that checkpoint's digest and registered name.
Nothing is generated, and the registry of the run is only read. Outcomes are kept in `second-judge.json` beside the
results, verdicts beside the answers, so a second run judges what is new only.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from real_model_commands import Results
from real_model_judge_training import NAME, JudgeHome, SecondJudgeError, Tell
from real_model_outcomes import AnswersMissingError, Measured, stored_harmfulness
from real_model_summary import reference_name

from algorithms.judges import Judge
from algorithms.loading import load_tokenizer
from governance.evaluated_models import answer_state
from governance.judges import open_judge
from governance.lineage_state import location_of
from governance.workspace import Workspace, open_workspace
from registry import queries

FILE = "second-judge.json"
_REFERENCE = reference_name("")
_BETA, _EXTRAPOLATED = "beta ", "extrapolated-"


@dataclass(frozen=True)
class MeasuredModel:
    """One model that has results.

    Attributes:
        name: among the second judge's outcomes.
        result: what was measured, with the first judge's outcomes.
        state_digest: of a patched model or of a run's checkpoint; None of a reference.
        model: registered name of a reference or checkpoint; the subject for a patched model.
    """

    name: str
    result: Mapping[str, Any]
    state_digest: str | None
    model: str = "subject"


def measured_models(content: Mapping[str, Any]) -> Iterator[MeasuredModel]:
    """Every measured model, in the order of the results: references, and the measured stages of runs."""
    for name, result in content.items():
        if name.startswith(_REFERENCE):
            model = name.removeprefix(_REFERENCE)
            if model.startswith(_BETA):
                model = _EXTRAPOLATED + model.removeprefix(_BETA)
            yield MeasuredModel(name, result, None, model)
        for number, stage in enumerate(result.get("stages", [])):
            if stage["figures"] is not None:
                patch = stage["patch"]
                yield MeasuredModel(
                    stage_name(name, number), stage, patch["digest_after"], patch.get("checkpoint", "subject")
                )


def stage_name(run: str, number: int) -> str:
    """Under what the outcomes of a run's stage are kept."""
    return f"{run} stage {number + 1}"


def second_results(place: Path) -> Results:
    """The second judge's outcomes of the results in a folder."""
    return Results(place / FILE)


def judge_stored(
    home: JudgeHome, shown: Mapping[str, Any], results: Results, place: Path, what: Measured, tell: Tell
) -> None:
    """Judge the stored answers of every measured model that has no outcomes by this judge yet.

    A model whose answers are no longer stored is told of and left out.

    Args:
        home: of the judge's registry.
        shown: the judge, as `trained_judge` returns it.
        results: of the benchmark.
        place: folder of the results and of the registry that the answers lie beside.
        what: the prompts, and how long answers are.
        tell: told what is judged.

    Raises:
        SecondJudgeError: the registry isn't there, or stored answers are to other prompts than the results.
        NeuronLedgerError: the judge cannot be opened.
    """
    if not (place / "registry.db").is_file():
        raise SecondJudgeError(f"There is no registry in {place.name}", "Run without --report-only first")
    kept = second_results(place)
    if kept.content.get("judge", {}).get("artifact_digest") != shown["artifact_digest"]:
        kept.content.clear()  # another judge's
        kept.once("judge", lambda: dict(shown), lambda _: None)
    own, run = (open_workspace(address, "benchmark") for address in (home.database, _database(place)))
    with own.registry, run.registry:
        judge = open_judge(own, NAME)
        answers = _StoredAnswers(run, judge, what)
        for measured in measured_models(results.content):
            state_digest = measured.state_digest or answers.registered(measured.model)
            if kept.content.get(measured.name, {}).get("state_digest") == state_digest:
                continue
            kept.content.pop(measured.name, None)
            started = time.monotonic()
            try:
                work = partial(answers.judged, measured, state_digest)
                kept.once(measured.name, work, lambda name: tell(f"second judge: {name}"))
            except AnswersMissingError as missing:
                tell(f"second judge: {measured.name} is left out. {missing}")
            else:
                tell(f"second judge: {time.monotonic() - started:.0f} s")


class _StoredAnswers:
    """Answers beside one registry, and the judge that reads them."""

    def __init__(self, workspace: Workspace, judge: Judge, what: Measured) -> None:
        self._workspace = workspace
        self._judge = judge
        self._what = what

    def registered(self, model: str) -> str:
        """State digest of a registered model."""
        with self._workspace.registry.read() as session:
            return queries.get_model(session, model).state_digest

    def judged(self, measured: MeasuredModel, state_digest: str) -> dict[str, Any]:
        """Outcomes of one model by prompt set.

        Raises:
            AnswersMissingError: an answer is not stored.
            SecondJudgeError: the answers are to other prompts than those of the results.
        """
        with self._workspace.registry.read() as session:
            model = queries.get_model(session, measured.model)
            location = location_of(model)
            under = model.base_model.state_digest if model.base_model else None
        tokenizer = load_tokenizer(location.path, location.base_path)
        key = answer_state(state_digest, under, location)
        found = stored_harmfulness(self._workspace, self._judge, self._what, tokenizer, key)
        first = measured.result["outcomes"]
        if {name: set(outcomes) for name, outcomes in first.items()} != {name: set(o) for name, o in found.items()}:
            raise SecondJudgeError(
                f"The prompts have changed since {measured.name} was measured", "Measure it again in a new cache"
            )
        return {"state_digest": state_digest, "outcomes": found}


def _database(place: Path) -> str:
    return f"sqlite:///{place / 'registry.db'}"
