"""Marks and labels of the report's charts stand inside them and apart from each other, for few and for many."""

from itertools import pairwise

import pytest

from governance.report_charts import HEIGHT, WIDTH, Box, layer_panels, rate_panels
from governance.report_figures import Control, Figure, FigureTable, Quantity, Stage, StageFigures
from tests.governance.made_reports import made_identification


@pytest.mark.parametrize("blocks", [1, 2, 32, 80, 126])
def test_layer_points_stand_inside_the_chart_and_the_window_is_marked(blocks: int) -> None:
    (panel,) = layer_panels([made_identification(1, "animals", "fgsn", blocks)])
    assert len(panel.points) == blocks
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, _ in panel.points)
    assert all(x >= 0 and x + width <= WIDTH for x, width in panel.bands)
    for x, _, scoped in panel.points:
        assert scoped is any(start <= x <= start + width for start, width in panel.bands)
    ticks = [tick.position for tick in panel.x_ticks]
    assert all(later - earlier > 14 for earlier, later in pairwise(ticks))


@pytest.mark.parametrize("patches", [0, 1, 5, 30])
def test_marks_stand_inside_the_chart(patches: int) -> None:
    stages = [Stage(name, "", None, None, None, False, False) for name in ("base", "aligned", "subject")]
    stages += [Stage(f"after patch {n}", "a", n, "a", 0.1 * n, False, False) for n in range(1, patches + 1)]
    figures = [Figure(100.0 * (index % 2), 1, 1, 0.0, 100.0) for index in range(len(stages))]
    rows = tuple(StageFigures(stage, (figure,)) for stage, figure in zip(stages, figures, strict=True))
    table = FigureTable((Quantity("harmfulness", "a", "j 1"),), rows, (Control("c", rows[3:]),), ("j 1",), 0, ())
    (panel,) = rate_panels(table, ("a",))
    assert len(panel.marks) == len(stages)
    assert len(panel.controls) == patches
    for mark in panel.marks:
        assert 0 <= mark.x <= WIDTH
        assert 8 <= mark.y_label <= HEIGHT
        assert 0 <= mark.y_high <= mark.y <= mark.y_low <= HEIGHT
    places = [mark.x for mark in panel.marks]
    assert places == sorted(set(places))


@pytest.mark.parametrize("value", [0.0, 2.5, 15.0, 50.0, 97.0, 100.0])
@pytest.mark.parametrize("beside", [(), (0.0,), (4.0,), (17.5,), (90.0,), (100.0,), (10.0, 30.0), (5.0, 20.0, 60.0)])
def test_printed_values_do_not_stand_on_a_control(value: float, beside: tuple[float, ...]) -> None:
    stage = Stage("after patch 1", "a", 1, "a", 0.1, False, True)
    row = StageFigures(stage, (Figure(value, 1, 1, max(0.0, value - 6), min(100.0, value + 6)),))
    controls = tuple(
        Control(str(at), (StageFigures(stage, (Figure(other, 1, 1, other, other),)),))
        for at, other in enumerate(beside)
    )
    table = FigureTable((Quantity("harmfulness", "a", "j 1"),), (row,), controls, ("j 1",), 0, ())
    (panel,) = rate_panels(table, ("a",))
    (mark,) = panel.marks
    assert mark.box.left >= 0
    assert mark.box.right <= WIDTH
    assert not any(mark.box.meets(Box(x - 3, y - 3, x + 3, y + 3)) for x, y in panel.controls)
    assert 8 <= mark.y_label <= HEIGHT


@pytest.mark.parametrize("steep", [(100.0, 100.0, 11.2, 10.0, 5.0), (100.0, 3.9, 0.0, 0.0), (100.0, 60.0, 30.0, 25.0)])
def test_printed_values_stand_neither_on_the_line_nor_on_each_other(steep: tuple[float, ...]) -> None:
    stages = [Stage(name, "", None, None, None, False, False) for name in ("base", "aligned", "subject")]
    stages += [Stage(f"after patch {n}", "a", n, "a", 0.1 * n, False, False) for n in range(len(steep) - 1)]
    figures = [Figure(value, 1, 1, max(0.0, value - 5), min(100.0, value + 8)) for value in (100.0, 0.0, *steep)]
    rows = tuple(StageFigures(stage, (figure,)) for stage, figure in zip(stages, figures, strict=True))
    (panel,) = rate_panels(FigureTable((Quantity("harmfulness", "a", "j 1"),), rows, (), ("j 1",), 0, ()), ("a",))
    line = [(mark.x, mark.y) for mark in panel.marks[2:]]
    for number, mark in enumerate(panel.marks):
        assert not any(mark.box.is_crossed(*pair) for pair in pairwise(line)), mark.value
        assert not any(mark.box.meets(other.box, apart=3) for other in panel.marks[:number]), mark.value


def test_the_name_of_the_working_copy_has_the_room_of_a_name() -> None:
    stages = [Stage(name, "", None, None, None, False, False) for name in ("base", "aligned", "subject")]
    stages += [Stage(f"after patch {n}", "a", n, "a", 0.1 * n, False, False) for n in range(4)]
    stages.append(Stage("patch 4, rejected", "a", None, None, None, False, False, 4))
    rows = tuple(StageFigures(stage, (Figure(50.0, 1, 2, 40.0, 60.0),)) for stage in stages)
    (panel,) = rate_panels(FigureTable((Quantity("harmfulness", "a", "j 1"),), rows, (), ("j 1",), 0, ()), ("a",))
    places = {tick.label: tick.position for tick in panel.x_ticks}
    assert places["none"] - places["subject"] == pytest.approx(places["aligned"] - places["base"])
    assert places["(4)"] - places["3"] == pytest.approx(places["3"] - places["2"])
