"""Evaluation: harmfulness per dimension on held-out prompts, accuracy and over-refusal, each with n and interval.

Harmfulness here is the share of harmful prompts that a refusal-phrase judge does not see refused. That is not the
harmfulness that a trained judge would measure, so the judge's name and version stand beside every figure.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session
from torch import nn

from algorithms.generation import generate
from algorithms.judges import Judge, RefusalPhraseJudge
from algorithms.loading import load_model
from algorithms.rates import Rate, wilson_rate
from governance.errors import InputError
from governance.lineage_state import LineageState, read_lineage
from governance.prompt_sets import PromptRow, PromptSource, parse_canonical, read_prompt_set
from governance.prompt_sets import PromptSet as PromptRows
from governance.references import registered_reference
from governance.workspace import Workspace
from registry import queries
from registry.schema import Evaluation, PromptSet, SafetyDimension

Success = Callable[[PromptRow, str], bool]
_ANSWER_MARGIN = 4
"""Tokens beyond the expected answer: a leading line break, another way to cut the words."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure, on which model of a lineage.

    Attributes:
        model: `head` (the working checkpoint), `subject`, `aligned` or `base` of the lineage, or the name of a
            registered reference.
        dimensions: names of dimensions with held-out prompts; empty: every dimension that has some.
        accuracy: metric name → prompts with expected answers; an answer counts when it begins with the expected one.
        other_harmful: metric name → harmful prompts of kinds that no dimension was registered with.
        over_refusal: safe prompts that should be answered, or None.
        judge: what decides whether an answer refuses.
        max_new_tokens: longest answer.
        batch_size: prompts answered together.
    """

    model: str = "head"
    dimensions: tuple[str, ...] = ()
    accuracy: Mapping[str, PromptSource] = field(default_factory=dict)
    other_harmful: Mapping[str, PromptSource] = field(default_factory=dict)
    over_refusal: PromptSource | None = None
    judge: Judge = field(default_factory=RefusalPhraseJudge)
    max_new_tokens: int = 64
    batch_size: int = 32


@dataclass(frozen=True)
class Measurement:
    """One measured rate; value and interval in percent."""

    stage: str
    metric: str
    dimension: str | None
    value: float
    numerator: int
    n: int
    interval_low: float
    interval_high: float
    judge: str
    created_at: datetime


@dataclass(frozen=True)
class _Unregistered:
    """Prompts of no dimension: they are recorded with the figure."""

    source: PromptSource
    content: PromptRows


@dataclass(frozen=True)
class _Task:
    metric: str
    dimension: str | None
    dimension_id: int | None
    prompts: "int | _Unregistered"
    rows: tuple[PromptRow, ...]
    success: Success
    judge: Judge | None

    def longest_answer(self, tokenizer: Any, most: int) -> int:
        """Return how many tokens are worth generating: an answer is compared with the expected one's beginning only."""
        if self.judge is not None:
            return most
        expected = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in self.rows)
        return min(most, expected + _ANSWER_MARGIN)


def evaluate(workspace: Workspace, lineage_name: str, request: EvaluationRequest) -> list[Measurement]:
    """Measure one model of a lineage and record every figure.

    Raises:
        InputError: a dimension has no held-out prompts, there is nothing to measure, or the model is no reference.
        RecordNotFoundError: no model of that name.
        MismatchError: the reference is no model that the subject pairs with.
        WeightsChangedError: the model's files are not what was recorded.
    """
    with workspace.attempt("evaluate", "lineage", lineage_name):
        return _evaluate(workspace, lineage_name, request)


def _evaluate(workspace: Workspace, lineage_name: str, request: EvaluationRequest) -> list[Measurement]:
    lineage = read_lineage(workspace, lineage_name)
    tasks = _tasks(workspace, request)
    model, tokenizer = _load(workspace, lineage, request.model)
    measured = []
    for task in tasks:
        tokens = task.longest_answer(tokenizer, request.max_new_tokens)
        answers = _answers(workspace, model, tokenizer, task, request.batch_size, tokens)
        successes = sum(task.success(row, answer) for row, answer in zip(task.rows, answers, strict=True))
        generation = {"decoding": "greedy", "max_new_tokens": tokens, "batch_size": request.batch_size}
        measured.append((task, wilson_rate(successes, len(task.rows)), generation))
    with workspace.registry.write() as session:
        sets = [_prompt_set(workspace, session, task) for task, _, _ in measured]
        records = [
            _record(workspace, session, lineage, request.model, *one, held.id)
            for one, held in zip(measured, sets, strict=True)
        ]
        workspace.record(
            session,
            "evaluation.recorded",
            "lineage",
            lineage_name,
            {
                "model": request.model,
                "head": lineage.head_sequence,
                "figures": [
                    {
                        "metric": task.metric,
                        "dimension": task.dimension,
                        "successes": rate.successes,
                        "n": rate.n,
                        "prompts": held.digest,
                    }
                    for (task, rate, _), held in zip(measured, sets, strict=True)
                ],
                "judge": f"{request.judge.name} {request.judge.version}",
                "judge_digest": request.judge.digest,
            },
            records=[*records, *sets],
        )
        return [measurement(record, task.dimension) for record, (task, _, _) in zip(records, measured, strict=True)]


def measurement(record: Evaluation, dimension: str | None) -> Measurement:
    """Describe one recorded evaluation."""
    return Measurement(
        stage=record.stage,
        metric=record.metric,
        dimension=dimension,
        value=record.value,
        numerator=record.numerator or 0,
        n=record.n or 0,
        interval_low=record.interval_low or 0.0,
        interval_high=record.interval_high or 0.0,
        judge=f"{record.judge} {record.judge_version}" if record.judge else "",
        created_at=record.created_at,
    )


def _tasks(workspace: Workspace, request: EvaluationRequest) -> list[_Task]:
    judge = request.judge
    others = list(_other_tasks(request))
    with workspace.registry.read() as session:
        tasks = [_heldout_task(workspace, session, dimension, judge) for dimension in _dimensions(session, request)]
    tasks += others
    if not tasks:
        raise InputError("there is nothing to measure", "register a dimension with --heldout, or pass --accuracy")
    return tasks


def _other_tasks(request: EvaluationRequest) -> Iterator[_Task]:
    judge = request.judge
    for metric, source in request.other_harmful.items():
        yield _other_task(metric, source, read_prompt_set(source), _complied(judge), judge)
    for metric, source in request.accuracy.items():
        prompt_set = read_prompt_set(source)
        if any(row.answer is None for row in prompt_set.rows):
            raise InputError(f"the prompts for {metric} have no expected answers", "name their column")
        yield _other_task(metric, source, prompt_set, _correct, None)
    if request.over_refusal is not None:
        safe = read_prompt_set(request.over_refusal)
        yield _other_task("over_refusal", request.over_refusal, safe, _refused(judge), judge)


def _other_task(
    metric: str, source: PromptSource, prompt_set: PromptRows, success: Success, judge: Judge | None
) -> _Task:
    return _Task(metric, None, None, _Unregistered(source, prompt_set), prompt_set.rows, success, judge)


def _heldout_task(workspace: Workspace, session: Session, dimension: SafetyDimension, judge: Judge) -> _Task:
    held_out = queries.prompt_sets(session, dimension_id=dimension.id, purpose="heldout")
    if not held_out:
        raise InputError(f"dimension {dimension.name} has no held-out prompts", "register it with --heldout FILE")
    rows = parse_canonical(workspace.store.read_bytes(held_out[0].digest))
    return _Task("harmfulness", dimension.name, dimension.id, held_out[0].id, rows, _complied(judge), judge)


def _dimensions(session: Session, request: EvaluationRequest) -> list[SafetyDimension]:
    if request.dimensions:
        return [queries.get_dimension(session, name) for name in request.dimensions]
    return [
        dimension
        for dimension in queries.list_dimensions(session)
        if queries.prompt_sets(session, dimension_id=dimension.id, purpose="heldout")
    ]


def _prompt_set(workspace: Workspace, session: Session, task: _Task) -> PromptSet:
    """The record of a task's prompts, made if they are of no dimension and were never evaluated with before."""
    if isinstance(task.prompts, int):
        return session.get_one(PromptSet, task.prompts)
    source, prompt_set = task.prompts.source, task.prompts.content
    digest = workspace.store.put_bytes(prompt_set.canonical)
    for held in queries.prompt_sets(session, purpose="evaluation"):
        if held.digest == digest:
            return held
    record = PromptSet(
        purpose="evaluation",
        source=source.location,
        source_filter={"where": dict(source.where), "limit": source.limit},
        columns={"prompt": list(source.prompt_columns), "answer": source.answer_column},
        rows=len(prompt_set.rows),
        digest=digest,
        created_at=workspace.clock(),
    )
    session.add(record)
    session.flush()
    return record


def _load(workspace: Workspace, lineage: LineageState, model: str) -> tuple[nn.Module, Any]:
    if model == "head":
        return load_model(lineage.working, lineage.locations["subject"].base_path)
    location = lineage.locations.get(model) or registered_reference(workspace, lineage, model)[0]
    return load_model(location.path, location.base_path)


def _answers(
    workspace: Workspace, model: nn.Module, tokenizer: Any, task: _Task, batch_size: int, max_new_tokens: int
) -> list[str]:
    label = f"{task.metric} {task.dimension or ''}".strip()

    def report(done: int, total: int) -> None:
        workspace.progress(label, done, total)

    return generate(
        model,
        tokenizer,
        [row.prompt for row in task.rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=report,
    )


def _record(
    workspace: Workspace,
    session: Session,
    lineage: LineageState,
    name: str,
    task: _Task,
    rate: Rate,
    generation: dict[str, Any],
    prompt_set_id: int,
) -> Evaluation:
    record = queries.get_lineage(session, lineage.name)
    models = {"head": None, "subject": record.subject, "aligned": record.aligned, "base": record.base}
    model = models[name] if name in models else queries.get_model(session, name)
    stage = name if name in models else "reference"
    evaluation = Evaluation(
        lineage_id=lineage.lineage_id,
        model_id=model.id if model else None,
        patch_id=None if model else lineage.head_patch_id,
        stage=stage if model else f"patch {lineage.head_sequence or 0}",
        dimension_id=task.dimension_id,
        metric=task.metric,
        value=100 * rate.value,
        numerator=rate.successes,
        n=rate.n,
        interval_low=100 * rate.low,
        interval_high=100 * rate.high,
        judge=task.judge.name if task.judge else None,
        judge_version=task.judge.version if task.judge else None,
        prompt_set_id=prompt_set_id,
        generation=generation,
        state_digest=model.state_digest if model else lineage.state_digest,
        created_at=workspace.clock(),
        actor=workspace.actor,
    )
    session.add(evaluation)
    return evaluation


def _complied(judge: Judge) -> Success:
    return lambda _, answer: not judge.refused(answer)


def _refused(judge: Judge) -> Success:
    return lambda _, answer: judge.refused(answer)


def _correct(row: PromptRow, answer: str) -> bool:
    expected = " ".join((row.answer or "").casefold().split())
    return " ".join(answer.casefold().split()).startswith(expected)
