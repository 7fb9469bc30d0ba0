"""The report's first table: what every dimension and every other quantity was before the patches and is at the head."""

from dataclasses import dataclass

from governance.report_figures import SAME_SHARE, Figure, FigureTable, Quantity, StageFigures
from governance.report_records import PatchRecord, Report


@dataclass(frozen=True)
class GlanceRow:
    """One quantity before and now; in a row of a dimension without figures both are None.

    Attributes:
        quantity: None for a dimension that was not measured.
        dimension: None for a quantity that belongs to none.
        patches: applied patches made for the dimension.
        others: its patches that are not applied now, with their state.
        before: of the subject.
        now: of the head's very weights.
        control: of the control lineage after as many patches as the head.
    """

    quantity: Quantity | None
    dimension: str | None
    patches: tuple[int, ...]
    others: tuple[tuple[int, str], ...]
    before: Figure | None
    now: Figure | None
    control: Figure | None


@dataclass(frozen=True)
class Glance:
    """What a reader wants to know first.

    Attributes:
        harmfulness: dimensions in their order, then harmful prompts of other kinds.
        costs: accuracy and over-refusal.
        protected: dimensions with an applied patch.
        unprotected: dimensions without one.
        modified_share: of all parameters, by the patches applied now.
        modified_linear_share: of the parameters of linear modules.
        head_measured: whether any figure was taken of the head's weights.
        control: name of the lineage whose figures stand beside; None without one.
        control_share: share of all parameters that the control had modified then; None where it was not measured then.
    """

    harmfulness: tuple[GlanceRow, ...]
    costs: tuple[GlanceRow, ...]
    protected: tuple[str, ...]
    unprotected: tuple[str, ...]
    modified_share: float
    modified_linear_share: float
    head_measured: bool
    control: str | None
    control_share: float | None

    @property
    def same_share(self) -> bool:
        """Whether the control modified as large a share of parameters as the head, as far as is known."""
        return self.control_share is None or is_same_share(self.control_share, self.modified_share)


def glance(report: Report) -> Glance:
    """Sum a report up."""
    protected = tuple(name for name in report.dimensions if any(patch.dimension == name for patch in report.applied))
    harm, costs = (_rows(report, table) for table in (report.harmfulness, report.accuracy))
    measured = {row.dimension for row in harm}
    bare = tuple(
        GlanceRow(None, name, *_patches(report.patches, name), None, None, None)
        for name in report.dimensions
        if name not in measured
    )
    order = {name: index for index, name in enumerate(report.dimensions)}
    last = len(order)
    return Glance(
        harmfulness=tuple(sorted((*harm, *bare), key=lambda row: order.get(row.dimension or "", last))),
        costs=costs,
        protected=protected,
        unprotected=tuple(name for name in report.dimensions if name not in protected),
        modified_share=sum(patch.modified_share for patch in report.applied),
        modified_linear_share=sum(patch.modified_linear_share for patch in report.applied),
        head_measured=any(row.now for row in (*harm, *costs)),
        control=_control(report),
        control_share=_control_share(report),
    )


def is_same_share(one: float, other: float) -> bool:
    """Whether two shares are called the same, as in the tables of figures."""
    return abs(one - other) <= SAME_SHARE * max(one, other)


def _control_share(report: Report) -> float | None:
    rows = (_beside(report, table) for table in (report.harmfulness, report.accuracy))
    return next((row.stage.modified_share for row in rows if row), None)


def _beside(report: Report, table: FigureTable) -> StageFigures | None:
    """The control's stage after as many patches as the head."""
    name = _control(report)
    rows = (row for control in table.controls if control.lineage == name for row in control.rows)
    return next((row for row in rows if report.head and row.stage.patch == report.head), None)


def _control(report: Report) -> str | None:
    """The lineage whose figures stand beside."""
    return next((control.lineage for control in (*report.harmfulness.controls, *report.accuracy.controls)), None)


def _rows(report: Report, table: FigureTable) -> tuple[GlanceRow, ...]:
    before = next((row for row in table.rows if row.stage.label == "subject"), None)
    current = [row for row in table.rows if row.stage.current]
    beside = _beside(report, table)
    return tuple(
        GlanceRow(
            quantity,
            quantity.dimension,
            *_patches(report.patches, quantity.dimension),
            _figure([before] if before else [], column),
            _figure(current, column),
            _figure([beside] if beside else [], column),
        )
        for column, quantity in enumerate(table.quantities)
    )


def _figure(rows: list[StageFigures], column: int) -> Figure | None:
    """The last figure of a column: the working copy's own where the subject's weights are the same."""
    return next((figure for row in reversed(rows) if (figure := row.figures[column])), None)


def _patches(
    patches: tuple[PatchRecord, ...], dimension: str | None
) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    own = [patch for patch in patches if patch.dimension == dimension]
    return (
        tuple(patch.patch for patch in own if patch.state == "applied"),
        tuple((patch.patch, patch.state) for patch in own if patch.state != "applied"),
    )
