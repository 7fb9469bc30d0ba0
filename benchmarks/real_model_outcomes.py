"""Measures a model of a lineage by `neuronledger evaluate --json`, and reads what became of every prompt.

The command prints rates. Paired tests between lineages need the outcome of every prompt, which is judged once more from
the answers that the evaluation kept beside the registry.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_model_commands import Commands

from algorithms.judges import Judge, RefusalPhraseJudge
from governance.evaluated_models import model_of
from governance.evaluation import EvaluationRequest, answer_tasks
from governance.judge_choice import choose_judge
from governance.lineage_state import read_lineage
from governance.measuring import GenerationSettings, stored_outcomes
from governance.metrics import ATTACK_SUCCESS, HARMFULNESS
from governance.prompt_sets import PromptSource
from governance.workspace import Workspace, open_workspace
from neuronledger import NeuronLedgerError

_KEPT = ("value", "numerator", "n", "interval_low", "interval_high")


class AnswersMissingError(NeuronLedgerError):
    """The answers of an evaluation are not in the store."""


@dataclass(frozen=True)
class Measured:
    """Where the prompts of a measurement are, and how its answers are generated.

    Attributes:
        harmful: unseen kind -> file.
        accuracy: task -> file.
        over_refusal: file of safe prompts.
        kl: file of harmless prompts.
        max_new_tokens: longest answer.
        judge: of harmfulness, as `neuronledger evaluate` names it.
    """

    harmful: Mapping[str, Path]
    accuracy: Mapping[str, Path]
    over_refusal: Path
    kl: Path
    max_new_tokens: int
    judge: str = "phrases"

    def options(self) -> Sequence[object]:
        """For `neuronledger evaluate`."""
        return (
            *("--max-new-tokens", self.max_new_tokens, "--judge", self.judge),
            *(part for name, file in self.harmful.items() for part in ("--harmful", f"{name}={file}")),
            *(part for name, file in self.accuracy.items() for part in ("--accuracy", f"{name}={file}")),
            *("--over-refusal", self.over_refusal),
            *("--kl", self.kl, "--against", "subject"),
        )


class Measuring:
    """Measures models of one registry on the same prompts."""

    def __init__(self, commands: Commands, what: Measured, place: Path) -> None:
        self._commands = commands
        self._what = what
        self._place = place

    def __call__(self, lineage: str, model: str) -> dict[str, Any]:
        """Figures by prompt set, and the outcome of every harmful prompt.

        Raises:
            AnswersMissingError: an answer that was just given is not in the store.
        """
        figures = self._commands("evaluate", lineage, "--model", model, *self._what.options())
        return {
            "judge": next(figure["judge"] for figure in figures if figure["metric"].startswith(HARMFULNESS)),
            "figures": {_name(figure): {key: figure[key] for key in _KEPT} for figure in figures},
            "outcomes": self._outcomes(lineage, model),
        }

    def _outcomes(self, lineage: str, model: str) -> dict[str, dict[str, bool]]:
        workspace = open_workspace(f"sqlite:///{self._place / 'registry.db'}", "benchmark")
        with workspace.registry:
            measured = model_of(workspace, read_lineage(workspace, lineage), model)
            judge = choose_judge(workspace, self._what.judge, RefusalPhraseJudge())
            return stored_harmfulness(workspace, judge, self._what, measured.tokenizer(), measured.key)


def stored_harmfulness(
    workspace: Workspace, judge: Judge, what: Measured, tokenizer: Any, state: str
) -> dict[str, dict[str, bool]]:
    """Prompt set -> digest of a prompt -> whether its stored answer is harmful. Nothing is generated.

    Args:
        workspace: whose registry holds the dimensions, and beside which the answers are.
        judge: of harmfulness.
        what: the prompts of unseen kinds, and how long the answers are.
        tokenizer: of the model that answered.
        state: that its answers are stored under.

    Raises:
        AnswersMissingError: an answer is not in the store.
    """
    generation = GenerationSettings(what.max_new_tokens)
    harmful = {f"{HARMFULNESS}_{name}": PromptSource(str(file)) for name, file in what.harmful.items()}
    found = {}
    for task in answer_tasks(workspace, EvaluationRequest(other_harmful=harmful, judges=(judge,))):
        if not task.metric.startswith(HARMFULNESS):
            continue  # attack success, which a judge other than phrases brings along
        outcomes = stored_outcomes(workspace, task, tokenizer, state, generation)
        name = task.dimension or task.metric.removeprefix(f"{HARMFULNESS}_")
        if outcomes is None:
            raise AnswersMissingError(f"Answers for {name} are not stored", "Run it once more")
        prompts = [_digest(row.prompt) for row in task.prompts.rows]
        found[name] = dict(zip(prompts, outcomes, strict=True))
    return found


def _name(figure: Mapping[str, Any]) -> str:
    metric = str(figure["metric"])
    if metric.startswith(ATTACK_SUCCESS):
        return f"{metric} {figure['dimension'] or ''}".strip()
    if figure["dimension"]:
        return str(figure["dimension"])
    return "kl" if metric.startswith("kl_") else metric.removeprefix(f"{HARMFULNESS}_").removesuffix("_accuracy")


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
