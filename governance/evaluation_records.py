"""Recording what was measured: one record for each figure, of a model or of a lineage in one state.

What is measured need not have been written: a patch that was refused has its figures recorded under a stage of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy.orm import Session

from algorithms.judges import Identified
from governance.measured_tasks import TaskPrompts
from governance.prompt_set_records import evaluation_prompts
from governance.workspace import Workspace
from registry.schema import Evaluation, PromptSet


@dataclass(frozen=True)
class MeasuredState:
    """Whose figures they are.

    Attributes:
        lineage_id: the lineage.
        stage: as shown, such as `aligned` or `patch 2`.
        state_digest: of the weights that were measured.
        model_id: the registered model, or None.
        patch_id: the patch whose outcome was measured, or None.
    """

    lineage_id: int
    stage: str
    state_digest: str
    model_id: int | None = None
    patch_id: int | None = None


class Figure(Protocol):
    """What is recorded of a measured figure; `governance.measuring.Measured` is one."""

    @property
    def metric(self) -> str:
        """The metric's name."""

    @property
    def dimension(self) -> str | None:
        """Name of the dimension whose held-out prompts were asked."""

    @property
    def dimension_id(self) -> int | None:
        """Its id."""

    @property
    def value(self) -> float:
        """A rate in percent, anything else in its own unit."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end of the 95 % interval, in the unit of the value."""

    @property
    def n(self) -> int | None:
        """Prompts."""

    @property
    def numerator(self) -> int | None:
        """Of a rate, the outcomes that count."""

    @property
    def judge(self) -> Identified | None:
        """Who judged."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """The settings that it was measured with."""

    @property
    def prompts(self) -> TaskPrompts | None:
        """The prompts; None where a library brought its own."""

    @property
    def answers_digest(self) -> str | None:
        """SHA-256 of the answers, in order."""

    @property
    def from_store(self) -> int:
        """How many answers were taken from the store."""


@dataclass(frozen=True)
class RecordedFigures:
    """What was added to the session.

    Attributes:
        evaluations: one for each figure, in order.
        prompt_sets: the records of their prompts.
        told: what the event says of each figure; no prompt and no answer stands in it.
    """

    evaluations: tuple[Evaluation, ...]
    prompt_sets: tuple[PromptSet, ...]
    told: tuple[dict[str, Any], ...]


def add_figures(
    workspace: Workspace, session: Session, state: MeasuredState, figures: Sequence[Figure]
) -> RecordedFigures:
    """Add the records of measured figures, and of prompts that are not recorded yet, to a session.

    The caller appends the event, with `records=[*evaluations, *prompt_sets]`.
    """
    sets = [_prompt_set(workspace, session, figure.prompts) if figure.prompts else None for figure in figures]
    evaluations = tuple(_evaluation(workspace, state, *one) for one in zip(figures, sets, strict=True))
    session.add_all(evaluations)
    told = tuple(_told(*one) for one in zip(figures, sets, strict=True))
    return RecordedFigures(evaluations, tuple(held for held in sets if held is not None), told)


def _evaluation(workspace: Workspace, state: MeasuredState, figure: Figure, held: PromptSet | None) -> Evaluation:
    low, high = figure.interval or (None, None)
    return Evaluation(
        lineage_id=state.lineage_id,
        model_id=state.model_id,
        patch_id=state.patch_id,
        stage=state.stage,
        dimension_id=figure.dimension_id,
        metric=figure.metric,
        value=figure.value,
        numerator=figure.numerator,
        n=figure.n,
        interval_low=low,
        interval_high=high,
        judge=figure.judge.name if figure.judge else None,
        judge_version=figure.judge.version if figure.judge else None,
        prompt_set_id=held.id if held else None,
        generation=dict(figure.generation),
        state_digest=state.state_digest,
        created_at=workspace.clock(),
        actor=workspace.actor,
    )


def _told(figure: Figure, held: PromptSet | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "metric": figure.metric,
        "dimension": figure.dimension,
        "value": figure.value,
        "n": figure.n,
    }
    if held is not None:
        told["prompts"] = held.digest
    if figure.numerator is not None:
        told["successes"] = figure.numerator
    if figure.judge is not None:
        told |= {"judge": f"{figure.judge.name} {figure.judge.version}", "judge_digest": figure.judge.digest}
    if figure.answers_digest is not None:
        told |= {"answers": figure.answers_digest, "answers_from_store": figure.from_store}
    return told


def _prompt_set(workspace: Workspace, session: Session, prompts: TaskPrompts) -> PromptSet:
    """The record of a task's prompts, made if they are of no dimension and were never evaluated with before."""
    if isinstance(prompts.recorded, int):
        return session.get_one(PromptSet, prompts.recorded)
    digest = workspace.store.put_bytes(prompts.recorded.canonical)
    return evaluation_prompts(workspace, session, prompts.recorded, digest)
