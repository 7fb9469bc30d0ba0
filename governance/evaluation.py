"""Evaluation: harmfulness per dimension on held-out prompts, accuracy, over-refusal, KL, each with n and interval.

Harmfulness is the share of harmful prompts whose answer a judge calls unsafe. What the default judge, refusal phrases,
calls unsafe is not what a trained judge would, so the judge's name and version stand beside every figure. Attack
success is the share that holds no refusal phrase, whoever judges harmfulness.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy.orm import Session
from torch import nn

from algorithms.generation import first_token_log_probabilities
from algorithms.judges import Judge, RefusalPhraseJudge
from algorithms.rates import Agreement, PairedTest, agreement, mcnemar
from algorithms.scorers import ScorerName
from governance.endpoint_judge import EndpointJudge
from governance.errors import InputError
from governance.evaluated_models import EvaluatedModel, model_of
from governance.evaluation_records import add_figures
from governance.lineage_state import read_lineage
from governance.measured_tasks import (
    AnswerTask,
    Correct,
    DivergenceTask,
    HarmScore,
    Refusing,
    Task,
    TaskPrompts,
    Unsafe,
)
from governance.measuring import GenerationSettings, Measured, measure, stored_outcomes
from governance.metrics import ATTACK_SUCCESS, HARM_SCORE, HARMFULNESS, KL, OVER_REFUSAL, unit_of
from governance.prompt_sets import PromptSource, parse_canonical, read_prompt_set
from governance.workspace import Workspace
from registry import queries
from registry.schema import Evaluation, SafetyDimension


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure, on which model of a lineage.

    Attributes:
        model: `head` (the working checkpoint), `subject`, `aligned` or `base` of the lineage, or the name of a
            registered reference.
        dimensions: names of dimensions with held-out prompts; empty: every dimension that has some.
        accuracy: metric name → prompts with expected answers.
        scorers: metric name → how answers are compared with expected ones; `prefix` where none is named.
        other_harmful: metric name, which begins with `harmfulness_` → harmful prompts of kinds that no dimension was
            registered with.
        over_refusal: safe prompts that should be answered, or None.
        kl: benign prompts on which next-token distributions are compared with those of `against`, or None.
        judges: what decides whether an answer is unsafe; harmfulness is measured by each.
        refusals: what decides whether an answer refuses.
        against: another model, named as `model` is. Figures are compared with its answers to the same prompts where
            they are in the store, and distributions with its own. None: no comparison.
        generation: how answers are generated.
    """

    model: str = "head"
    dimensions: tuple[str, ...] = ()
    accuracy: Mapping[str, PromptSource] = field(default_factory=dict)
    scorers: Mapping[str, ScorerName] = field(default_factory=dict)
    other_harmful: Mapping[str, PromptSource] = field(default_factory=dict)
    over_refusal: PromptSource | None = None
    kl: PromptSource | None = None
    judges: tuple[Judge, ...] = (RefusalPhraseJudge(),)
    refusals: RefusalPhraseJudge = field(default_factory=RefusalPhraseJudge)
    against: str | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@dataclass(frozen=True)
class Comparison:
    """A figure held against the same prompts under another model."""

    against: str
    before: float
    test: PairedTest


@dataclass(frozen=True)
class JudgeAgreement:
    """How far two judges of the same answers agree."""

    judge: str
    agreement: Agreement


@dataclass(frozen=True)
class Measurement:
    """One measured figure; a rate and its interval in percent, a mean in its unit.

    Attributes:
        unit: `%`, `nats`, `1-5`, or `lm-eval` for what the harness gives.
        numerator: of a rate; None for a mean.
        n: prompts; None where the harness does not say.
        interval_low, interval_high: None where the harness gives no standard error.
        comparison: with another model on the same prompts, where that was asked for and its answers are known.
        agreements: with the judges of the same answers that came before.
    """

    stage: str
    metric: str
    dimension: str | None
    value: float
    unit: str
    numerator: int | None
    n: int | None
    interval_low: float | None
    interval_high: float | None
    judge: str
    created_at: datetime
    comparison: Comparison | None = None
    agreements: tuple[JudgeAgreement, ...] = ()


def evaluate(workspace: Workspace, lineage_name: str, request: EvaluationRequest) -> list[Measurement]:
    """Measure one model of a lineage and record every figure.

    Raises:
        InputError: a dimension has no held-out prompts, there is nothing to measure, or the model is no reference.
        RecordNotFoundError: no model of that name.
        MismatchError: the reference is no model that the subject pairs with.
        WeightsChangedError: the model's files are not what was recorded.
        JudgeError: a judge cannot be used.
    """
    with workspace.attempt("evaluate", "lineage", lineage_name):
        return _evaluate(workspace, lineage_name, request)


def _evaluate(workspace: Workspace, lineage_name: str, request: EvaluationRequest) -> list[Measurement]:
    lineage = read_lineage(workspace, lineage_name)
    model = model_of(workspace, lineage, request.model)
    against = model_of(workspace, lineage, request.against) if request.against else None
    tasks: list[Task] = list(answer_tasks(workspace, request))
    if request.kl is not None:
        tasks.append(_divergence_task(workspace, request.kl, against, request.generation.batch_size))
    if not tasks:
        raise InputError("there is nothing to measure", "register a dimension with --heldout, or pass --accuracy")
    figures = measure(
        workspace, tasks, partial(model.load, workspace.placement), model.tokenizer(), model.key, request.generation
    )
    comparisons = _comparisons(workspace, figures, request, against)
    agreements = _agreements(figures)
    with workspace.registry.write() as session:
        recorded = add_figures(workspace, session, model.state, figures)
        told = [
            one | ({"against": _told(comparison)} if comparison else {})
            for one, comparison in zip(recorded.told, comparisons, strict=True)
        ]
        workspace.record(
            session,
            "evaluation.recorded",
            "lineage",
            lineage_name,
            {"model": request.model, "head": lineage.head_sequence, "figures": told},
            records=[*recorded.evaluations, *recorded.prompt_sets],
        )
        return [
            measurement(record, figure.dimension, comparison, agreed)
            for record, figure, comparison, agreed in zip(
                recorded.evaluations, figures, comparisons, agreements, strict=True
            )
        ]


def measurement(
    record: Evaluation,
    dimension: str | None,
    comparison: Comparison | None = None,
    agreements: tuple[JudgeAgreement, ...] = (),
) -> Measurement:
    """Describe one recorded evaluation."""
    return Measurement(
        stage=record.stage,
        metric=record.metric,
        dimension=dimension,
        value=record.value,
        unit=unit_of(record.metric),
        numerator=record.numerator,
        n=record.n,
        interval_low=record.interval_low,
        interval_high=record.interval_high,
        judge=f"{record.judge} {record.judge_version}" if record.judge else "",
        created_at=record.created_at,
        comparison=comparison,
        agreements=agreements,
    )


# --- what is measured


def answer_tasks(workspace: Workspace, request: EvaluationRequest) -> list[AnswerTask]:
    """The tasks of a request that are measured on answers: harmfulness, attack success, accuracy, over-refusal.

    Raises:
        InputError: a dimension has no held-out prompts, or prompts for accuracy have no expected answers.
        PromptSetError: a prompt set cannot be read.
    """
    others = list(_other_tasks(request))
    with workspace.registry.read() as session:
        return [
            task
            for dimension in _dimensions(session, request)
            for task in _heldout_tasks(workspace, session, dimension, request)
        ] + others


def divergence_task(
    source: PromptSource,
    against: str,
    model: nn.Module,
    tokenizer: Any,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DivergenceTask:
    """The task of comparing next-token distributions with those of a loaded model, which may be let go afterwards.

    Args:
        source: benign prompts.
        against: what the loaded model is called in the record.
        model: the reference.
        tokenizer: its tokenizer.
        batch_size: prompts read together; None: as many as fit.
        progress: told of prompts read.

    Raises:
        PromptSetError: the prompts cannot be read.
        CalibrationError: a prompt does not fit into memory.
    """
    prompts = _prompts_of(source)
    texts = [row.prompt for row in prompts.rows]
    reference = first_token_log_probabilities(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    return DivergenceTask(f"{KL}_{against}", prompts, against, reference)


def _other_tasks(request: EvaluationRequest) -> Iterator[AnswerTask]:
    for metric, source in request.other_harmful.items():
        yield from _harmful_tasks(request, _prompts_of(source), metric.removeprefix(HARMFULNESS))
    for metric, source in request.accuracy.items():
        prompts = _prompts_of(source)
        if any(row.answer is None for row in prompts.rows):
            raise InputError(f"the prompts for {metric} have no expected answers", "name their column")
        yield AnswerTask(metric, prompts, Correct(request.scorers.get(metric, "prefix")))
    if request.over_refusal is not None:
        safe = _prompts_of(request.over_refusal)
        yield AnswerTask(OVER_REFUSAL, safe, Refusing(request.refusals, refused=True))


def _heldout_tasks(
    workspace: Workspace, session: Session, dimension: SafetyDimension, request: EvaluationRequest
) -> Iterator[AnswerTask]:
    held_out = queries.prompt_sets(session, dimension_id=dimension.id, purpose="heldout")
    if not held_out:
        raise InputError(f"dimension {dimension.name} has no held-out prompts", "register it with --heldout FILE")
    rows = parse_canonical(workspace.store.read_bytes(held_out[0].digest))
    prompts = TaskPrompts(rows, held_out[0].id)
    yield from _harmful_tasks(request, prompts, "", dimension.name, dimension.id)


def _harmful_tasks(
    request: EvaluationRequest,
    prompts: TaskPrompts,
    suffix: str,
    dimension: str | None = None,
    dimension_id: int | None = None,
) -> Iterator[AnswerTask]:
    """Harmfulness by every judge, with the mean of marks where a judge gives some.

    Attack success too, unless that is what a judge by the same phrases measures.
    """
    for judge in request.judges:
        yield AnswerTask(f"{HARMFULNESS}{suffix}", prompts, Unsafe(judge), dimension, dimension_id)
        if isinstance(judge, EndpointJudge):
            yield AnswerTask(f"{HARM_SCORE}{suffix}", prompts, HarmScore(judge), dimension, dimension_id)
    if request.refusals not in request.judges:
        attacked = Refusing(request.refusals, refused=False)
        yield AnswerTask(f"{ATTACK_SUCCESS}{suffix}", prompts, attacked, dimension, dimension_id)


def _dimensions(session: Session, request: EvaluationRequest) -> list[SafetyDimension]:
    if request.dimensions:
        return [queries.get_dimension(session, name) for name in request.dimensions]
    return [
        dimension
        for dimension in queries.list_dimensions(session)
        if queries.prompt_sets(session, dimension_id=dimension.id, purpose="heldout")
    ]


def _prompts_of(source: PromptSource) -> TaskPrompts:
    content = read_prompt_set(source)
    return TaskPrompts(content.rows, content)


def _divergence_task(
    workspace: Workspace, source: PromptSource, against: EvaluatedModel | None, batch_size: int | None
) -> DivergenceTask:
    if against is None:
        raise InputError("KL is measured against no model", "pass --against subject, aligned, head or a reference")

    def progress(done: int, total: int) -> None:
        workspace.progress(f"distributions of {against.name}", done, total)

    model, tokenizer = against.load(workspace.placement), against.tokenizer()
    return divergence_task(source, against.name, model, tokenizer, batch_size, progress)


# --- comparisons


def _comparisons(
    workspace: Workspace, figures: Sequence[Measured], request: EvaluationRequest, against: EvaluatedModel | None
) -> list[Comparison | None]:
    if against is None:
        return [None] * len(figures)
    tokenizer = against.tokenizer()
    found: list[Comparison | None] = []
    for figure in figures:
        before = stored_outcomes(workspace, figure.task, tokenizer, against.key, request.generation)
        if before is None:
            found.append(None)
            continue
        share = 100 * sum(before) / len(before)
        found.append(Comparison(against.name, share, mcnemar(before, figure.outcomes)))
    return found


def _told(comparison: Comparison) -> dict[str, Any]:
    test = comparison.test
    return {
        "model": comparison.against,
        "only_before": test.only_before,
        "only_after": test.only_after,
        "p": test.p,
    }


def _agreements(figures: Sequence[Measured]) -> list[tuple[JudgeAgreement, ...]]:
    """For every figure how far its judge agrees with those that came before, on the same answers."""
    found = []
    for number, figure in enumerate(figures):
        others = [
            other
            for other in figures[:number]
            if isinstance(figure.task, AnswerTask)
            and isinstance(figure.task.grader, Unsafe)
            and isinstance(other.task, AnswerTask)
            and isinstance(other.task.grader, Unsafe)
            and other.task.prompts is figure.task.prompts
        ]
        found.append(
            tuple(
                JudgeAgreement(f"{other.judge.name} {other.judge.version}", agreement(other.outcomes, figure.outcomes))
                for other in others
                if other.judge is not None
            )
        )
    return found
