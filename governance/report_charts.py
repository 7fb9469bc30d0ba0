"""Where the marks of the report's charts stand, in units of their SVG view boxes. The template draws them."""

from collections.abc import Sequence
from dataclasses import dataclass

from governance.report_figures import Control, Figure, FigureTable, Stage, StageFigures
from governance.report_records import IdentificationRecord

WIDTH = 340.0
HEIGHT = 214.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 12.0, 20.0, 40.0
_GUTTER = 14.0
"""Room between the reference models and the lineage's own stages."""

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Mark:
    """A measured point with its interval, and the place of its printed value."""

    x: float
    y: float
    y_low: float
    y_high: float
    value: str
    y_label: float
    own: bool


@dataclass(frozen=True)
class Tick:
    """A label on an axis; `strong` marks the patch that was made for the panel's dimension."""

    position: float
    label: str
    strong: bool = False


@dataclass(frozen=True)
class RatePanel:
    """One quantity over the stages, in percent.

    Attributes:
        marks: the reference models and the stages of the lineage.
        path: SVG path through the subject and the patched stages.
        controls: the points of control lineages.
        control_paths: a path for each control lineage, from the subject on.
        separator: x of the line between reference models and lineage; None without both.
        description: every figure as text.
    """

    title: str
    judge: str
    colour: int | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    path: str
    controls: tuple[tuple[float, float], ...]
    control_paths: tuple[str, ...]
    separator: float | None
    description: str


@dataclass(frozen=True)
class LayerPanel:
    """The gap of every block in one identification, in radians.

    Attributes:
        points: x, y and whether the block was in scope.
        bands: x and width of every run of blocks in scope.
        zero: y of gap 0.
    """

    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[tuple[float, float, bool], ...]
    path: str
    bands: tuple[tuple[float, float], ...]
    zero: float
    scope: str
    description: str


def rate_panels(table: FigureTable, dimensions: Sequence[str]) -> tuple[RatePanel, ...]:
    """Lay out one panel for each quantity.

    Args:
        table: the figures.
        dimensions: names in the order of their colours.
    """
    places, separator = _places([row.stage for row in table.rows])
    return tuple(_rate_panel(table, column, places, separator, dimensions) for column in range(len(table.quantities)))


def layer_panel(record: IdentificationRecord) -> LayerPanel | None:
    """Lay out the layer curve of an identification; None where no gap was recorded."""
    known = [(layer.block, layer.gap, layer.in_scope) for layer in record.layers if layer.gap is not None]
    if not known:
        return None
    gaps = [gap for _, gap, _ in known]
    low, high = _range(min(0.0, *gaps), max(0.0, *gaps))
    step = (WIDTH - LEFT - RIGHT - 12) / max(1, len(record.layers) - 1)
    first = record.layers[0].block

    def place_x(block: int) -> float:
        return round(LEFT + 6 + (block - first) * step, 2)

    def place_y(gap: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - gap) / (high - low), 2)

    every = max(1, -(-len(record.layers) // 12))
    in_scope = [layer.block for layer in record.layers if layer.in_scope]
    half = min(step / 2, 6.0)
    points = tuple((place_x(block), place_y(gap), scoped) for block, gap, scoped in known)
    scope = _ranges(in_scope)
    return LayerPanel(
        title=record.label,
        x_ticks=tuple(Tick(place_x(layer.block), str(layer.block)) for layer in record.layers[::every]),
        y_ticks=tuple(Tick(place_y(value), f"{value:.2f}") for value in (low, (low + high) / 2, high)),
        points=points,
        path=_path([(x, y) for x, y, _ in points]),
        bands=tuple(
            (round(place_x(start) - half, 2), round(place_x(end) - place_x(start) + 2 * half, 2))
            for start, end in _runs(in_scope)
        ),
        zero=place_y(0.0),
        scope=scope,
        description=f"In scope: {scope or 'no block'}. "
        + ", ".join(f"block {block} {gap:.3f}" for block, gap, _ in known),
    )


def _rate_panel(
    table: FigureTable, column: int, places: dict[int, float], separator: float | None, dimensions: Sequence[str]
) -> RatePanel:
    quantity = table.quantities[column]
    points = [(index, row.stage, figure) for index, row in enumerate(table.rows) if (figure := row.figures[column])]
    controls = [_control_points(control, column, table.rows, places) for control in table.controls]
    beside = {x: y for line in controls for x, y in line}
    start = [(places[index], _y(figure.value)) for index, stage, figure in points if stage.label == "subject"]
    own = [(places[index], _y(figure.value)) for index, stage, figure in points if stage.patch is not None]
    return RatePanel(
        title=quantity.title,
        judge=quantity.judge,
        colour=dimensions.index(quantity.dimension) if quantity.dimension in dimensions else None,
        x_ticks=tuple(
            Tick(places[index], _short(row.stage), _is_own(row.stage, quantity.dimension))
            for index, row in enumerate(table.rows)
        ),
        y_ticks=tuple(Tick(_y(value), str(value)) for value in (0, 25, 50, 75, 100)),
        marks=tuple(
            _mark(places[index], figure, beside.get(places[index]), own=_is_own(stage, quantity.dimension))
            for index, stage, figure in points
        ),
        path=_path([*start, *own]),
        controls=tuple(point for line in controls for point in line),
        control_paths=tuple(_path([*start, *line]) for line in controls if line),
        separator=separator,
        description="; ".join(_sentence(stage, figure) for _, stage, figure in points),
    )


def _places(stages: Sequence[Stage]) -> tuple[dict[int, float], float | None]:
    """An x for every stage, the reference models set apart."""
    references = [index for index, stage in enumerate(stages) if stage.label in {"base", "aligned"}]
    own = [index for index in range(len(stages)) if index not in references]
    gutter = _GUTTER if references and own else 0.0
    inner = WIDTH - LEFT - RIGHT - gutter
    step = inner / max(1, len(stages))
    places = {}
    for order, index in enumerate([*references, *own]):
        places[index] = round(LEFT + step * (order + 0.5) + (gutter if index in own else 0.0), 2)
    separator = round(LEFT + step * len(references) + gutter / 2, 2) if gutter else None
    return places, separator


def _control_points(
    control: Control, column: int, rows: Sequence[StageFigures], places: dict[int, float]
) -> list[tuple[float, float]]:
    """A control's stage stands where the lineage's stage of the same patch number stands."""
    found: dict[int, float] = {}
    for row in control.rows:
        figure = row.figures[column]
        if figure is not None and row.stage.patch is not None:
            found.setdefault(row.stage.patch, _y(figure.value))
    points = []
    for index, row in enumerate(rows):
        if row.stage.patch is not None and row.stage.patch in found:
            points.append((places[index], found.pop(row.stage.patch)))
    return points


def _mark(x: float, figure: Figure, beside: float | None, *, own: bool) -> Mark:
    y = _y(figure.value)
    low = _y(figure.value if figure.low is None else figure.low)
    high = _y(figure.value if figure.high is None else figure.high)
    below = beside is not None and beside < y and low + 12 < _y(0)
    return Mark(x, y, low, high, f"{figure.value:.1f}", round(low + 12 if below else high - 5, 2), own)


def _y(percent: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - percent / 100), 2)


def _short(stage: Stage) -> str:
    if stage.patch is None:
        return stage.label
    return str(stage.patch) if stage.patch else "none"


def _is_own(stage: Stage, dimension: str | None) -> bool:
    return dimension is not None and stage.dimension == dimension


def _sentence(stage: Stage, figure: Figure) -> str:
    interval = f", 95 % interval {figure.low:.1f} to {figure.high:.1f}" if None not in {figure.low, figure.high} else ""
    return f"{stage.label} {figure.value:.1f} %{interval}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in points) if len(points) > 1 else ""


def _range(low: float, high: float) -> tuple[float, float]:
    """Round outwards to a tidy step, so that the axis has readable ends."""
    if low == high:
        return low, low + 1.0
    step = next((step for step in _STEPS if (high - low) / step <= 8), _STEPS[-1])
    return step * (low // step), step * -(-high // step)


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def _ranges(blocks: Sequence[int]) -> str:
    """Blocks as text: `10 to 15, 20`."""
    return ", ".join(f"{start} to {end}" if end > start else str(start) for start, end in _runs(blocks))
