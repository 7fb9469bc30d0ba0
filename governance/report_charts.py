"""Where the marks of the report's charts stand, in units of their SVG view boxes. The template draws them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor

from governance.report_figures import Control, Figure, FigureTable, Stage, StageFigures
from governance.report_records import IdentificationRecord

WIDTH = 340.0
HEIGHT = 214.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 12.0, 24.0, 40.0
_GUTTER = 14.0
"""Room between the reference models and the lineage's own stages."""

_NAME_WIDTH = 40.0
"""Room that the names of the reference models, of the subject and of the working copy without a patch need."""

_CROWDED = 9
"""With more stages than this only the first, the last and the panel's own figures are printed into the chart."""

_LETTERS = 12.0
"""Highest base line of a printed value, so that it stands inside the chart."""

_DIGIT, _POINT = 6.2, 3.1
"""Widths of what printed values are made of."""

_HALF = 3.0
"""Half of a control's point."""

_APART = 4.0
"""Room between two printed values."""

_COSTS = (100, 10, 1)
"""What a printed value should least stand on, then less so: another value, a control's point, a line."""

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A measured point with its interval, and the place of its printed value ("": none is printed).

    Attributes:
        x_label: middle of the printed value.
        y_label: its base line.
    """

    x: float
    y: float
    y_low: float
    y_high: float
    value: str
    x_label: float
    y_label: float
    own: bool

    @property
    def box(self) -> "Box":
        """Where the printed value stands."""
        return _box(self.value, self.x_label, self.y_label)


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box", apart: float = 0.0) -> bool:
        """Whether the two share more than an edge, or stand side by side less than so far apart."""
        return (
            self.left < other.right + apart
            and other.left < self.right + apart
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def is_crossed(self, start: Point, end: Point) -> bool:
        """Whether a straight line from start to end runs through it."""
        enters, leaves = 0.0, 1.0
        for at, to, low, high in zip(start, end, (self.left, self.top), (self.right, self.bottom), strict=True):
            if at == to:
                if not low < at < high:
                    return False
                continue
            first, last = sorted(((low - at) / (to - at), (high - at) / (to - at)))
            enters, leaves = max(enters, first), min(leaves, last)
        return enters < leaves


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
    x_title: str
    description: str


@dataclass(frozen=True)
class LayerPanel:
    """The gap of every block in one identification, in radians.

    Attributes:
        points: x, y and whether the block was in scope.
        radius: of the points, less where many blocks stand close.
        bands: x and width of every run of blocks in scope.
        zero: y of gap 0.
    """

    title: str
    dimension: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[tuple[float, float, bool], ...]
    radius: float
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


def layer_panels(records: Sequence[IdentificationRecord]) -> tuple[LayerPanel, ...]:
    """Lay out the layer curves of the identifications that recorded one, all on the same scale."""
    gaps = [layer.gap for record in records for layer in record.layers if layer.gap is not None]
    if not gaps:
        return ()
    levels = _levels(min(0.0, *gaps), max(0.0, *gaps))
    return tuple(
        _layer_panel(record, levels) for record in records if any(layer.gap is not None for layer in record.layers)
    )


def _layer_panel(record: IdentificationRecord, levels: Sequence[float]) -> LayerPanel:
    known = [(layer.block, layer.gap, layer.in_scope) for layer in record.layers if layer.gap is not None]
    low, high = levels[0], levels[-1]
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
        dimension=record.dimension,
        x_ticks=tuple(Tick(place_x(layer.block), str(layer.block)) for layer in record.layers[::every]),
        y_ticks=tuple(Tick(place_y(level), f"{level:.2f}") for level in levels),
        points=points,
        radius=round(max(1.5, min(3.5, 0.45 * step)), 2),
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
    start = [(places[index], _y(figure.value)) for index, stage, figure in points if stage.label == "subject"]
    own = [(places[index], _y(figure.value)) for index, stage, figure in points if stage.patch is not None]
    lines = [*pairwise([*start, *own]), *(pair for line in controls for pair in pairwise([*start, *line]))]
    marks: list[Mark] = []
    for index, stage, figure in points:
        is_own = _is_own(stage, quantity.dimension)
        printed = is_own or _is_printed(index, stage, len(table.rows))
        marks.append(_mark(places[index], figure, own=is_own, printed=printed))
    lines += [((mark.x, mark.y_high), (mark.x, mark.y_low)) for mark in marks]
    for place, mark in enumerate(marks):
        marks[place] = _labelled(mark, [other for other in marks[:place] if other.value], controls, lines)
    return RatePanel(
        title=quantity.title,
        judge=quantity.judge,
        colour=dimensions.index(quantity.dimension) if quantity.dimension in dimensions else None,
        x_ticks=tuple(
            Tick(places[index], _short(row.stage), _is_own(row.stage, quantity.dimension))
            for index, row in enumerate(table.rows)
            if _is_labelled(index, row.stage, len(table.rows)) or _is_own(row.stage, quantity.dimension)
        ),
        y_ticks=tuple(Tick(_y(value), str(value)) for value in (0, 25, 50, 75, 100)),
        marks=tuple(marks),
        path=_path([*start, *own]),
        controls=tuple(point for line in controls for point in line),
        control_paths=tuple(_path([*start, *line]) for line in controls if line),
        separator=separator,
        x_title="after patch" if any(row.stage.patch is not None for row in table.rows) else "",
        description="; ".join(_sentence(stage, figure) for _, stage, figure in points),
    )


def _places(stages: Sequence[Stage]) -> tuple[dict[int, float], float | None]:
    """An x for every stage, the reference models set apart."""
    references = [index for index, stage in enumerate(stages) if stage.label in {"base", "aligned", "reference"}]
    own = [index for index in range(len(stages)) if index not in references]
    gutter = _GUTTER if references and own else 0.0
    inner = WIDTH - LEFT - RIGHT - gutter
    named = sum(map(_is_named, stages))
    even = inner / max(1, len(stages))
    broad = max(even, _NAME_WIDTH)
    narrow = (inner - named * broad) / (len(stages) - named) if len(stages) > named else even
    edge, places, separator = LEFT, {}, None
    for index in [*references, *own]:
        if own and index == own[0] and gutter:
            separator = round(edge + gutter / 2, 2)
            edge += gutter
        width = broad if _is_named(stages[index]) else narrow
        places[index] = round(edge + width / 2, 2)
        edge += width
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


def _mark(x: float, figure: Figure, *, own: bool, printed: bool) -> Mark:
    """A point whose printed value stands on it as yet."""
    y = _y(figure.value)
    low = _y(figure.value if figure.low is None else figure.low)
    high = _y(figure.value if figure.high is None else figure.high)
    return Mark(x, y, low, high, f"{figure.value:.1f}" if printed else "", x, y, own)


def _labelled(
    mark: Mark,
    before: Sequence[Mark],
    controls: Sequence[Sequence[Point]],
    lines: Sequence[tuple[Point, Point]],
) -> Mark:
    """The mark with its value printed where it stands on the least: the first such place."""
    points = [Box(x - _HALF, y - _HALF, x + _HALF, y + _HALF) for line in controls for x, y in line]

    def cost(place: Mark) -> int:
        box = place.box
        met = (
            sum(box.meets(other.box, _APART) for other in before),
            sum(box.meets(point) for point in points),
            sum(box.is_crossed(*line) for line in lines),
        )
        return sum(count * each for count, each in zip(met, _COSTS, strict=True))

    beside = [y for line in controls for x, y in line if x == mark.x]
    return min(_label_places(mark, beside), key=cost) if mark.value else mark


def _label_places(mark: Mark, beside: Sequence[float]) -> Iterator[Mark]:
    """Where a value may be printed, best places first: over or under its point, there a little aside, at its side."""
    half = (mark.box.right - mark.box.left) / 2
    above, below = max(_LETTERS, min(mark.y_high, mark.y - 5) - 4), max(mark.y_low, mark.y + 5) + 12
    rows = [above] if below >= _y(0) else [below, above] if any(y < mark.y for y in beside) else [above, below]
    for aside in (0, half - 3, 3 - half, half + 2, -half - 2):
        yield from (_placed(mark, mark.x + aside, row) for row in rows if _fits(mark.x + aside, half))
    yield from (_placed(mark, x, mark.y + 4) for x in (mark.x + 8 + half, mark.x - 8 - half) if _fits(x, half))
    yield _placed(mark, mark.x, max(_LETTERS, min(above, *beside, mark.y) - 7))


def _placed(mark: Mark, x: float, y: float) -> Mark:
    return replace(mark, x_label=round(x, 2), y_label=round(y, 2))


def _fits(middle: float, half: float) -> bool:
    return middle - half >= 0 and middle + half <= WIDTH


def _box(text: str, middle: float, base: float) -> Box:
    half = sum(_POINT if letter == "." else _DIGIT for letter in text) / 2
    return Box(middle - half, base - 9, middle + half, base + 1)


def _y(percent: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - percent / 100), 2)


def _is_named(stage: Stage) -> bool:
    """Whether a name stands on the axis instead of a patch's number."""
    return not stage.patch and stage.candidate is None


def _short(stage: Stage) -> str:
    if stage.candidate is not None:
        return f"({stage.candidate})"
    if stage.patch is None:
        return stage.label
    return str(stage.patch) if stage.patch else "none"


def _is_printed(index: int, stage: Stage, stages: int) -> bool:
    return stages <= _CROWDED or stage.patch is None or index == stages - 1


def _is_labelled(index: int, stage: Stage, stages: int) -> bool:
    """With many patches only every fifth has its number on the axis, so that the numbers do not touch."""
    return stages <= 2 * _CROWDED or stage.patch is None or index == stages - 1 or stage.patch % 5 == 0


def _is_own(stage: Stage, dimension: str | None) -> bool:
    return dimension is not None and stage.dimension == dimension


def _sentence(stage: Stage, figure: Figure) -> str:
    interval = f", 95 % interval {figure.low:.1f} to {figure.high:.1f}" if None not in {figure.low, figure.high} else ""
    return f"{stage.label} {figure.value:.1f} %{interval}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in points) if len(points) > 1 else ""


def _levels(low: float, high: float) -> tuple[float, ...]:
    """Round levels of an axis that holds both ends, which include 0: at most seven."""
    step = next((step for step in _STEPS if (high - low) / step <= 5), _STEPS[-1])
    return tuple(round(step * count, 4) for count in range(floor(low / step), max(ceil(high / step), 1) + 1))


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
