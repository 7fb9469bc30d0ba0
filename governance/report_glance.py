"""The report's first table: what every dimension and every other quantity was before the patches and is at the head."""

from dataclasses import dataclass

from governance.report_figures import Figure, FigureTable, Quantity, StageFigures
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
    """

    harmfulness: tuple[GlanceRow, ...]
    costs: tuple[GlanceRow, ...]
    protected: tuple[str, ...]
    unprotected: tuple[str, ...]
    modified_share: float
    modified_linear_share: float
    head_measured: bool
    control: str | None


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
    control = next(iter(report.harmfulness.controls or report.accuracy.controls), None)
    return Glance(
        harmfulness=tuple(sorted((*harm, *bare), key=lambda row: order.get(row.dimension or "", last))),
        costs=costs,
        protected=protected,
        unprotected=tuple(name for name in report.dimensions if name not in protected),
        modified_share=sum(patch.modified_share for patch in report.applied),
        modified_linear_share=sum(patch.modified_linear_share for patch in report.applied),
        head_measured=any(row.now for row in (*harm, *costs)),
        control=control.lineage if control else None,
    )


def _rows(report: Report, table: FigureTable) -> tuple[GlanceRow, ...]:
    before = next((row for row in table.rows if row.stage.label == "subject"), None)
    current = [row for row in table.rows if row.stage.current]
    controls = table.controls[0].rows if table.controls else ()
    beside = next((row for row in controls if report.head and row.stage.patch == report.head), None)
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
