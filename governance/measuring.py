"""Measuring a loaded model: answers are taken from the store or generated, then graded. Nothing is recorded here.

All answers are there before the first is judged, so that a model that was loaded for this can make room for a judge.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from algorithms.divergence import divergences
from algorithms.generation import answer_batches, encode_prompts, first_token_log_probabilities
from algorithms.judges import Identified, Judge, RefusalPhraseJudge, Verdict
from algorithms.rates import Mean, Rate, mean_with_interval, wilson_rate
from governance.answer_store import (
    KeyedLines,
    answer_key,
    answers_of,
    verdict_key,
    verdict_of,
    verdict_value,
    verdicts_of,
)
from governance.measured_tasks import AnswerTask, DivergenceTask, Grades, Task, TaskPrompts
from governance.placement import Precision
from governance.workspace import Workspace

_JUDGED_TOGETHER = 32
"""Answers that a judge is given at a time: what it says of them is stored before the next."""

LoadedOrLoader = nn.Module | Callable[[], nn.Module]
"""A model as `load_model` gives it, or what loads it; that is called only if something has to be computed."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated, beside greedily.

    Attributes:
        max_new_tokens: longest answer.
        batch_size: prompts answered together; None: as many as fit.
        fresh: generate and judge everything anew; what is stored is replaced.
    """

    max_new_tokens: int = 64
    batch_size: int | None = None
    fresh: bool = False


_AS_USUAL = GenerationSettings()


@dataclass(frozen=True)
class Measured:
    """One measured figure.

    Attributes:
        task: what was measured, on which prompts.
        found: a share of outcomes, or a mean of scores.
        outcomes: for every prompt, in order, whether it counts; empty for a mean. Before and after on the same prompts
            goes to `algorithms.rates.mcnemar`.
        scores: for every prompt, in order, what the mean is of; empty for a rate.
        generation: the settings that the answers were generated and graded with.
        answers_digest: SHA-256 of the answers, in order; None where none were generated.
        from_store: how many answers were taken from the store.
    """

    task: Task
    found: Rate | Mean
    outcomes: tuple[bool, ...]
    scores: tuple[float, ...]
    generation: dict[str, Any]
    answers_digest: str | None
    from_store: int

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.task.metric

    @property
    def dimension(self) -> str | None:
        """The dimension whose held-out prompts were asked."""
        return self.task.dimension

    @property
    def dimension_id(self) -> int | None:
        """Its id."""
        return self.task.dimension_id

    @property
    def prompts(self) -> TaskPrompts:
        """The prompts that were asked."""
        return self.task.prompts

    @property
    def judge(self) -> Identified | None:
        """Who judged."""
        return self.task.grader.judge if isinstance(self.task, AnswerTask) else None

    @property
    def value(self) -> float:
        """A rate in percent, a mean as it is."""
        return self._scale * self.found.value

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval, in the unit of the value."""
        return self._scale * self.found.low, self._scale * self.found.high

    @property
    def n(self) -> int:
        """Prompts."""
        return self.found.n

    @property
    def numerator(self) -> int | None:
        """Outcomes that count; None for a mean."""
        return self.found.successes if isinstance(self.found, Rate) else None

    @property
    def _scale(self) -> int:
        return 100 if isinstance(self.found, Rate) else 1


def measure(
    workspace: Workspace,
    tasks: Sequence[Task],
    model: LoadedOrLoader,
    tokenizer: Any,
    state: str,
    settings: GenerationSettings = _AS_USUAL,
) -> tuple[Measured, ...]:
    """Measure a model. The registry is not written; answers and verdicts go into the store beside it.

    Args:
        workspace: whose store is used, and whose progress is told.
        tasks: what to measure.
        model: the model in memory, or what loads it.
        tokenizer: its tokenizer.
        state: stands for the very weights, in letters and digits, such as their digest: what is stored under it was
            answered by this model.
        settings: how to generate.

    Returns:
        One figure for each task, in order.

    Raises:
        CalibrationError: a prompt is empty, distributions do not compare, or a prompt does not fit into memory.
        SettingsError: an expected answer cannot be compared with.
        JudgeError: a judge cannot be reached or does not answer.
    """
    subject = _Measuring(workspace, model, tokenizer, state, settings)
    found = [subject.divergence(task) if isinstance(task, DivergenceTask) else subject.answers(task) for task in tasks]
    subject.release()
    verdicts = _Verdicts(workspace, fresh=settings.fresh)
    dtype = workspace.placement.dtype
    return tuple(one if isinstance(one, Measured) else _graded(one, settings, dtype, verdicts) for one in found)


def stored_outcomes(
    workspace: Workspace, task: Task, tokenizer: Any, state: str, settings: GenerationSettings
) -> tuple[bool, ...] | None:
    """The outcomes of a task for another model, from the store; None where an answer is not there, or for a mean.

    Raises:
        SettingsError, JudgeError: as `measure`.
    """
    if not isinstance(task, AnswerTask):
        return None
    tokens = task.grader.longest_answer(tokenizer, task.prompts.rows, settings.max_new_tokens)
    stored = answers_of(workspace, state)
    encoded = encode_prompts(tokenizer, [row.prompt for row in task.prompts.rows])
    found = (stored.get(answer_key(ids, tokens, workspace.placement.dtype)) for ids in encoded)
    answers = [answer for answer in found if isinstance(answer, str)]
    if len(answers) < len(encoded):
        return None
    grades = task.grader.grade(task.prompts.rows, answers, _Verdicts(workspace, fresh=False))
    return grades.outcomes or None


@dataclass(frozen=True)
class _Answered:
    task: AnswerTask
    answers: tuple[str, ...]
    tokens: int
    from_store: int


class _Measuring:
    """A model that is measured, and what it has answered."""

    def __init__(
        self, workspace: Workspace, model: LoadedOrLoader, tokenizer: Any, state: str, settings: GenerationSettings
    ) -> None:
        self._workspace = workspace
        self._source = model
        self._model: nn.Module | None = None
        self._tokenizer = tokenizer
        self._settings = settings
        self._stored = answers_of(workspace, state)
        self._answered: set[str] = set()

    def release(self) -> None:
        """Let go of the model."""
        self._model = None
        self._source = _released

    def answers(self, task: AnswerTask) -> _Answered:
        """Answers to a task's prompts: stored ones, and new ones where there are none."""
        rows = task.prompts.rows
        tokens = task.grader.longest_answer(self._tokenizer, rows, self._settings.max_new_tokens)
        encoded = encode_prompts(self._tokenizer, [row.prompt for row in rows])
        keys = [answer_key(ids, tokens, self._workspace.placement.dtype) for ids in encoded]
        missing = {key: ids for key, ids in zip(keys, encoded, strict=True) if not self._known(key)}
        self._generate(_label(task), missing, tokens, len(set(keys)))
        answers = tuple(str(self._stored.get(key)) for key in keys)
        return _Answered(task, answers, tokens, sum(key not in missing for key in keys))

    def divergence(self, task: DivergenceTask) -> Measured:
        """How far the model's next words lie from the reference's."""
        found = first_token_log_probabilities(
            self._loaded(),
            self._tokenizer,
            [row.prompt for row in task.prompts.rows],
            batch_size=self._settings.batch_size,
            progress=lambda done, total: self._workspace.progress(_label(task), done, total),
        )
        scores = tuple(float(value) for value in divergences(task.reference, found))
        return Measured(
            task=task,
            found=mean_with_interval(scores, least=0.0),
            outcomes=(),
            scores=scores,
            generation={
                "distribution": "first answer token",
                "against": task.against,
                **self._workspace.placement.record,
            },
            answers_digest=None,
            from_store=0,
        )

    def _known(self, key: str) -> bool:
        fresh = self._settings.fresh and key not in self._answered
        return not fresh and isinstance(self._stored.get(key), str)

    def _generate(self, label: str, missing: dict[str, tuple[int, ...]], tokens: int, total: int) -> None:
        if not missing:
            return
        keys, encoded = list(missing), list(missing.values())
        done = total - len(missing)
        for batch in answer_batches(
            self._loaded(), self._tokenizer, encoded, max_new_tokens=tokens, batch_size=self._settings.batch_size
        ):
            self._stored.add({keys[index]: answer for index, answer in batch})
            self._answered.update(keys[index] for index, _ in batch)
            done += len(batch)
            self._workspace.progress(label, done, total)

    def _loaded(self) -> nn.Module:
        if self._model is None:
            self._model = self._source if isinstance(self._source, nn.Module) else self._source()
        return self._model


def _released() -> nn.Module:
    raise RuntimeError("the model was released")


class _Verdicts:
    """Verdicts of judges: stored ones, and new ones where there are none."""

    def __init__(self, workspace: Workspace, *, fresh: bool) -> None:
        self._workspace = workspace
        self._fresh = fresh
        self._judged: set[tuple[str, str]] = set()

    def __call__(self, judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Verdict, ...]:
        """One verdict for every answer to its prompt, in order."""
        if isinstance(judge, RefusalPhraseJudge):  # at once, so not worth keeping
            return judge.judge(prompts, answers)
        stored = verdicts_of(self._workspace, judge)
        pairs = {verdict_key(*pair): pair for pair in zip(prompts, answers, strict=True)}
        known = {key: verdict for key in pairs if (verdict := self._known(judge, stored, key)) is not None}
        missing = [key for key in pairs if key not in known]
        for start in range(0, len(missing), _JUDGED_TOGETHER):
            part = missing[start : start + _JUDGED_TOGETHER]
            found = judge.judge([pairs[key][0] for key in part], [pairs[key][1] for key in part])
            verdicts = dict(zip(part, found, strict=True))
            stored.add({key: verdict_value(verdict) for key, verdict in verdicts.items()})
            self._judged.update((judge.digest, key) for key in part)
            known |= verdicts
            self._workspace.progress(f"judging by {judge.name}", len(known), len(pairs))
        return tuple(known[verdict_key(*pair)] for pair in zip(prompts, answers, strict=True))

    def _known(self, judge: Judge, stored: KeyedLines, key: str) -> Verdict | None:
        anew = self._fresh and (judge.digest, key) not in self._judged
        return None if anew else verdict_of(stored.get(key))


def _graded(answered: _Answered, settings: GenerationSettings, dtype: Precision, verdicts: _Verdicts) -> Measured:
    task, answers = answered.task, answered.answers
    grades = task.grader.grade(task.prompts.rows, answers, verdicts)
    return Measured(
        task=task,
        found=_summed_up(grades),
        outcomes=grades.outcomes,
        scores=grades.scores,
        generation={
            "decoding": "greedy",
            "max_new_tokens": answered.tokens,
            "batch_size": settings.batch_size or "automatic",
            **({} if dtype == "float32" else {"dtype": dtype}),
            **task.grader.settings,
        },
        answers_digest=hashlib.sha256(json.dumps(answers).encode("ascii")).hexdigest(),
        from_store=answered.from_store,
    )


def _summed_up(grades: Grades) -> Rate | Mean:
    if grades.scores:
        return mean_with_interval(grades.scores, *grades.scale)
    return wilson_rate(sum(grades.outcomes), len(grades.outcomes))


def _label(task: Task) -> str:
    return f"{task.metric} {task.dimension or ''}".strip()
