"""In a browser nothing of a report overflows or stands on another label: on screens, in both schemes, and on paper.

Collected only where a Chromium is on the path.
"""

import struct
from pathlib import Path

import pytest

from governance.reporting import render
from tests.governance.browser import PAPER_WIDTH, Browser, find_browser
from tests.governance.made_reports import made_report

REPORTS = {
    "nothing": made_report(()),
    "one": made_report(("animals",)),
    "three": made_report(("animals", "weapons", "insults"), blocks=32, verified=False),
    "many": made_report(tuple(f"dimension number {number}" for number in range(1, 13)), blocks=80),
    "hostile": made_report(("x" * 255, "إساءة معاملة الحيوانات", "<b>\"'&", "🐕🔥 " * 60), lineage="y" * 255),
}
GROUND = {False: "rgb(253, 253, 252)", True: "rgb(21, 24, 27)"}


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = find_browser()
    assert program is not None, "this module is collected only where there is one"
    return Browser(program, tmp_path)


def test_what_overflows_or_stands_on_another_label_is_found(browser: Browser) -> None:
    texts = (
        '<svg role="img" viewBox="0 0 100 20" width="100"><text y="15">one</text><text x="9" y="15">two</text></svg>'
    )
    found = browser.measure(f'<!doctype html><body>{texts}<p style="width: 2000px">wide</p></body>')
    assert found["overflowing"] == ["P null: wide"]
    assert found["page"] > 2000
    assert found["labels"] == ["one on two"]


@pytest.mark.parametrize("name", ["one", "many", "hostile"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_overflows_on_a_screen(browser: Browser, name: str, width: int, dark: bool) -> None:
    found = browser.measure(render(REPORTS[name]), width, dark=dark)
    assert found["width"] == width
    assert found["overflowing"] == []
    assert found["page"] <= width
    assert found["labels"] == []
    assert found["ground"] == GROUND[dark]
    assert found["folded"] > 0


@pytest.mark.parametrize("name", ["nothing", "three", "many", "hostile"])
def test_nothing_is_cut_off_on_paper(browser: Browser, name: str) -> None:
    """No region can be scrolled there, so all of it has to fit; and what is folded on the screen is unfolded."""
    found = browser.measure(render(REPORTS[name]), PAPER_WIDTH, dark=True, paper=True)
    assert found["overflowing"] == []
    assert found["page"] <= PAPER_WIDTH
    assert found["labels"] == []
    assert found["ground"] == "rgb(255, 255, 255)"
    assert found["folded"] == 0


def test_pictures_and_a_print_can_be_made(browser: Browser) -> None:
    source = render(REPORTS["one"])
    light, dark = browser.picture(source), browser.picture(source, dark=True)
    for picture in (light, dark):
        assert picture.startswith(b"\x89PNG")
        assert struct.unpack(">II", picture[16:24]) == (1280, 1400)
    assert light != dark
    printed = browser.printed(source)
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") > 5
