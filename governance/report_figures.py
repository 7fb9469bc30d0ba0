"""What the report shows of evaluations: every stage of a lineage against every measured quantity.

A stage is a model of the lineage (base, aligned, subject), a reference, or the working checkpoint in one state. Where a
quantity was measured twice on the same state by the same judge, the later figure is shown and the earlier ones are
counted.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from governance.metrics import ATTACK_SUCCESS, HARM_SCORE, HARMFULNESS, unit_of
from governance.patch_creation import CANDIDATE
from registry import queries
from registry.schema import Evaluation, Lineage, Patch

MODEL_STAGES = ("base", "aligned", "reference", "subject")
SAME_SHARE = 0.05
"""How far shares may lie apart, relative to the larger, and still be called the same."""
_TITLES = {"over_refusal": "over-refusal"}


@dataclass(frozen=True)
class Stage:
    """One row of the tables.

    Attributes:
        label: as shown, such as `after patch 2`.
        detail: dimension of the stage's last patch, or what else sets the state apart.
        patch: number of the last patch that was applied then; 0 for the working copy before any; None for a model.
        dimension: of that patch.
        modified_share: share of all parameters that the patches applied then had modified; None for a model.
        reverted: whether that patch was reverted since.
        current: whether the lineage's head is in this state now.
        candidate: number of the patch that was judged in this state and never written; None for every other state.
    """

    label: str
    detail: str
    patch: int | None
    dimension: str | None
    modified_share: float | None
    reverted: bool
    current: bool
    candidate: int | None = None


@dataclass(frozen=True)
class Figure:
    """One measured figure with its 95 % interval: a rate in percent, a mean in its unit, as recorded."""

    value: float
    numerator: int | None
    n: int | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Quantity:
    """One column of the tables: a metric, of a dimension where it has one, judged by one judge (empty: none).

    `dtype` is the number format that the models ran in; empty for float32.
    """

    metric: str
    dimension: str | None
    judge: str
    dtype: str = ""

    @property
    def unit(self) -> str:
        """The unit of its values."""
        return unit_of(self.metric)

    @property
    def title(self) -> str:
        """What stands above the column."""
        return f"{self._named} ({self.dtype})" if self.dtype else self._named

    @property
    def _named(self) -> str:
        for name in (ATTACK_SUCCESS, HARM_SCORE):
            if self.metric.startswith(name):
                words = (name, self.dimension or self.metric.removeprefix(name))
                return " ".join(" ".join(words).replace("_", " ").split())
        named = _TITLES.get(self.metric) or self.metric.removeprefix(f"{HARMFULNESS}_").replace("_", " ")
        return self.dimension or named


@dataclass(frozen=True)
class StageFigures:
    """One stage and its figures, one for each quantity; None where it was not measured."""

    stage: Stage
    figures: tuple[Figure | None, ...]


@dataclass(frozen=True)
class Control:
    """A lineage of the same subject whose patches took random neurons."""

    lineage: str
    rows: tuple[StageFigures, ...]

    def same_share(self, rows: tuple[StageFigures, ...]) -> bool:
        """Whether it modified the share of parameters that the lineage's `rows` did, patch by patch.

        Neurons differ in their number of parameters, so shares rarely agree exactly.
        """
        shares = {row.stage.patch: row.stage.modified_share for row in rows if row.stage.patch}
        pairs = [(row.stage.modified_share, shares.get(row.stage.patch)) for row in self.rows if row.stage.patch]
        return bool(pairs) and all(
            own is not None and other is not None and abs(own - other) <= SAME_SHARE * max(own, other)
            for own, other in pairs
        )


@dataclass(frozen=True)
class FigureTable:
    """Figures of a lineage, and of its controls beside them.

    Attributes:
        superseded: how many earlier figures of the same state and judge are in the registry and not shown.
        generation: how the answers were generated, one sentence part for each way that was recorded.
        borrowed: other lineages of the subject that measured it, where this lineage did not.
    """

    quantities: tuple[Quantity, ...]
    rows: tuple[StageFigures, ...]
    controls: tuple[Control, ...]
    judges: tuple[str, ...]
    superseded: int
    generation: tuple[str, ...]
    borrowed: tuple[str, ...] = ()

    @property
    def has_candidates(self) -> bool:
        """Whether a patch that was judged and never written is among the rows."""
        return any(row.stage.candidate is not None for row in self.rows)

    def parts(self, columns: int) -> "tuple[FigureTable, ...]":
        """The table cut into tables of at most so many quantities, with all their rows."""

        def cut(rows: tuple[StageFigures, ...], start: int) -> tuple[StageFigures, ...]:
            return tuple(StageFigures(row.stage, row.figures[start : start + columns]) for row in rows)

        return tuple(
            replace(
                self,
                quantities=self.quantities[start : start + columns],
                rows=cut(self.rows, start),
                controls=tuple(Control(control.lineage, cut(control.rows, start)) for control in self.controls),
            )
            for start in range(0, len(self.quantities), columns)
        )


def is_harmfulness(metric: str) -> bool:
    """Whether a metric is harmfulness or attack success, of a dimension or of other harmful prompts."""
    return metric.startswith((HARMFULNESS, ATTACK_SUCCESS))


def figure_table(
    session: Session, lineage: Lineage, controls: Sequence[Lineage], wanted: Callable[[str], bool]
) -> FigureTable:
    """Gather the figures of the wanted metrics of a lineage and of its controls."""
    own = [record for record in queries.evaluations(session, lineage.id) if wanted(record.metric)]
    elsewhere = _of_the_subject_elsewhere(session, lineage, own)
    names = {other.id: other.name for other in queries.list_lineages(session)}
    others = {
        control.name: [record for record in queries.evaluations(session, control.id) if wanted(record.metric)]
        for control in controls
    }
    every = [*own, *(record for records in others.values() for record in records)]
    quantities = tuple(dict.fromkeys(quantity(record) for record in own))
    patches = queries.list_patches(session, lineage.id)
    shown = [control for control in controls if others[control.name]]
    return FigureTable(
        quantities=quantities,
        rows=_rows(session, lineage, [*elsewhere, *own], quantities),
        controls=tuple(
            Control(control.name, _rows(session, control, others[control.name], quantities)) for control in shown
        ),
        judges=tuple(dict.fromkeys(quantity(record).judge for record in every if record.judge)),
        superseded=len(own) - len({(_state(record, patches), quantity(record)) for record in own}),
        generation=tuple(dict.fromkeys(_generation(record) for record in every if record.generation)),
        borrowed=tuple(dict.fromkeys(names[record.lineage_id] for record in elsewhere)),
    )


def _of_the_subject_elsewhere(session: Session, lineage: Lineage, own: Sequence[Evaluation]) -> list[Evaluation]:
    """Figures of the very weights of the subject, which another lineage measured in the way that this one did not."""
    missing = {_way(record) for record in own} - {_way(record) for record in own if record.stage == "subject"}
    query = (
        select(Evaluation)
        .where(
            Evaluation.stage == "subject",
            Evaluation.state_digest == lineage.subject.state_digest,
            Evaluation.lineage_id != lineage.id,
        )
        .order_by(Evaluation.id)
    )
    return [record for record in session.scalars(query) if _way(record) in missing] if missing else []


def _way(record: Evaluation) -> tuple[Quantity, int | None, str]:
    """What was measured, on which prompts, and how the answers were generated."""
    return quantity(record), record.prompt_set_id, _generation(record)


def quantity(record: Evaluation) -> Quantity:
    """What an evaluation measured."""
    return Quantity(
        metric=record.metric,
        dimension=record.dimension.name if record.dimension else None,
        judge=f"{record.judge} {record.judge_version or ''}".strip() if record.judge else "",
        dtype=record.generation.get("dtype", ""),
    )


def _rows(
    session: Session, lineage: Lineage, records: Iterable[Evaluation], quantities: tuple[Quantity, ...]
) -> tuple[StageFigures, ...]:
    found: dict[tuple[str, str], dict[Quantity, Evaluation]] = {}
    patches = queries.list_patches(session, lineage.id)
    for record in records:
        found.setdefault(_state(record, patches), {})[quantity(record)] = record
    ordered = sorted(found, key=lambda state: MODEL_STAGES.index(state[0]) if state[0] in MODEL_STAGES else 9)
    return tuple(
        StageFigures(
            stage=_stage(lineage, patches, next(iter(found[state].values()))),
            figures=tuple(_figure(found[state].get(one)) for one in quantities),
        )
        for state in ordered
    )


def _state(record: Evaluation, patches: Sequence[Patch]) -> tuple[str, str]:
    """Stage and weights; what was judged before it was written is the same as what was measured afterwards."""
    judged = _judged(record, patches)
    stage = f"patch {judged.sequence}" if judged is not None and _was_written(judged, record) else record.stage
    return stage, record.state_digest


def _judged(record: Evaluation, patches: Sequence[Patch]) -> Patch | None:
    """The patch that a figure was measured of before it was written; None if it was measured otherwise."""
    if not record.stage.startswith(CANDIDATE):
        return None
    return next((patch for patch in patches if patch.id == record.patch_id), None)


def _was_written(patch: Patch, record: Evaluation) -> bool:
    return patch.applied_at is not None and patch.digest_after == record.state_digest


def _stage(lineage: Lineage, patches: Sequence[Patch], record: Evaluation) -> Stage:
    if record.stage in MODEL_STAGES:
        name = record.model.name if record.model else record.stage
        current = record.stage == "subject" and lineage.head is None
        return Stage(record.stage, name if name != record.stage else "", None, None, None, False, current)
    judged = _judged(record, patches)
    if judged is not None and not _was_written(judged, record):
        label = f"patch {judged.sequence}, {judged.state}"
        told = f"{judged.dimension.name}, judged and not written"
        return Stage(label, told, None, None, None, False, False, judged.sequence)
    at = judged.applied_at if judged is not None and judged.applied_at is not None else record.created_at
    applied = [patch for patch in patches if _was_applied(patch, at)]
    last = applied[-1] if applied else None
    numbers = [patch.sequence for patch in applied]
    reverted = last is not None and last.reverted_at is not None
    detail = last.dimension.name if last else "no patch applied"
    written = [patch.sequence for patch in patches if patch.applied_at is not None]
    if last is not None and numbers != [number for number in written if number <= last.sequence]:
        detail += f", applied then: {', '.join(map(str, numbers))}"
    return Stage(
        label=f"after patch {last.sequence}" if last else "working copy",
        detail=detail,
        patch=last.sequence if last else 0,
        dimension=last.dimension.name if last else None,
        modified_share=sum(patch.parameters_modified for patch in applied) / lineage.subject.parameters,
        reverted=reverted,
        current=record.state_digest == lineage.state_digest,
    )


def _was_applied(patch: Patch, at: datetime) -> bool:
    return (
        patch.applied_at is not None
        and patch.applied_at <= at
        and (patch.reverted_at is None or patch.reverted_at > at)
    )


def _figure(record: Evaluation | None) -> Figure | None:
    if record is None:
        return None
    return Figure(record.value, record.numerator, record.n, record.interval_low, record.interval_high)


def _generation(record: Evaluation) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record.generation.items())
