"""Whatever a lineage holds, its report can be read: by eye, by ear, by keyboard, in both schemes and on paper."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import governance
from governance.gate_rules import RuleResult
from governance.report_figures import Control
from governance.reporting import render
from registry.schema import PatchState
from tests.governance.made_reports import KINDS, START, made_report
from tests.governance.report_pages import Page, require_readable

LONG = "x" * 255
RIGHT_TO_LEFT = "إساءة معاملة الحيوانات"
EMOJI = "🐕🔥 caf\u00e9"
HOSTILE = ("<script>alert(1)<script>", "\"><img src=x onerror='alert(1)'>", "{{ 7 * 7 }}", LONG, RIGHT_TO_LEFT, EMOJI)
TEXT = ("ink", "muted", "link", "good", "bad")
GRAPHICS = ("ink", "muted", "good", "bad", "control", *(f"d{number}" for number in range(8)))
GROUNDS = ("page", "tint")
STYLE = Path(governance.__file__).parent / "templates" / "report.css"
DECORATION = {"page", "tint", "hair", "rule"}


@pytest.mark.parametrize(
    "names", [(), ("animals",), ("a", "b", "c"), tuple(f"dimension {n}" for n in range(23)), HOSTILE]
)
def test_every_page_is_self_contained_and_has_an_alternative_for_every_picture(names: tuple[str, ...]) -> None:
    page = Page(render(made_report(names)))
    require_readable(page)
    charts = sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in page.elements)
    assert charts == len(names) + (1 if names else 0) + sum(number != 1 for number in range(len(names)))
    assert len([tag for tag, _ in page.elements if tag == "desc"]) == charts


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_written_out_and_never_run(name: str) -> None:
    page = Page(render(made_report((name, "second"), lineage=name)))
    assert name in page.words
    assert page.row("table-glance", name)[1] == "protected|by patch 1"
    shown = page.tables["table-timeline"][1:]
    assert [row[1] for row in shown] == ["applied", "approved by decision", "applied", "reverted"]
    assert not [tag for tag, _ in page.elements if tag in {"script", "img"}]
    assert "49" not in page.tables["table-patches"][1][1]


def test_right_to_left_names_do_not_turn_round_what_follows() -> None:
    source = render(made_report((RIGHT_TO_LEFT, "second")))
    stripped = source.replace(f"\u2068{RIGHT_TO_LEFT}\u2069", "")
    commands = re.findall(r'<pre dir="ltr">.*?</pre>', source, re.DOTALL)
    assert any(RIGHT_TO_LEFT in command for command in commands)
    assert "\u2068" not in "".join(commands), "commands can be copied"
    left = [line for line in stripped.splitlines() if RIGHT_TO_LEFT in line and "<pre" not in line]
    assert all(re.search(f"\u2068[^\u2069]*{RIGHT_TO_LEFT}", line) for line in left)


@pytest.mark.parametrize("state", ["applying", "reverting"])
def test_a_head_that_is_being_written_or_was_interrupted_is_shown(state: PatchState) -> None:
    """A patch that is being reverted is the head of the record and no applied patch."""
    report = made_report(("animals", "weapons", "insults"))
    first, second, third = report.patches
    page = Page(render(replace(report, patches=(first, replace(second, state=state), third))))
    require_readable(page)
    others = ", ".join(f"1 {other}" for other in sorted(["reverted", state]))
    assert f"1 of 3 patches applied, {others}" in page.words


def test_a_lineage_without_patches_says_so() -> None:
    page = Page(render(made_report(())))
    for sentence in (
        "No dimension was patched or measured",
        "No patch is recorded",
        "No decision on a patch is recorded",
    ):
        assert sentence in page.text
    assert "0 of 0" in page.text


def test_a_glance_gives_before_now_and_control() -> None:
    page = Page(render(made_report(("animals", "weapons"))))
    assert page.row("table-glance", "animals") == [
        "animals|judged by own-phrases 1",
        "protected|by patch 1",
        "90.0|60.0 to 98.0",
        "10.0|2.0 to 40.0",
        "",
        "50.0|24.0 to 76.0",
    ]
    assert page.row("table-glance", "weapons")[1] == "not protected|patch 2 reverted"
    assert "1 of 2" in page.text
    assert "0.10 % 0.11 % of linear modules" in page.text


@pytest.mark.parametrize(("control", "told"), [(0.001, "beyond random neurons"), (0.0004, "not a control at the same")])
def test_shares_stand_over_the_figures_and_another_share_is_said(control: float, told: str) -> None:
    report = made_report()
    row = report.harmfulness.controls[0].rows[0]
    beside = Control("chance", (replace(row, stage=replace(row.stage, modified_share=control)),))
    page = Page(render(replace(report, harmfulness=replace(report.harmfulness, controls=(beside,)))))
    heads = page.tables["table-glance"][0]
    assert "0.10 % of parameters" in heads[3]
    assert f"{control:.2%} of parameters".replace("%", " %") in heads[5]
    notes = [text for text in ("beyond random neurons", "not a control at the same") if text in page.text]
    assert notes == [told]


@pytest.mark.parametrize(
    ("state", "said", "changed"),
    [
        ("applied", "a: applied", "42 rows in 14 modules"),
        ("reverted", "a: reverted", "42 rows in 14 modules (reverted)"),
        ("planned", "a: planned, not written", "would modify 42 rows in 14 modules (planned, not written)"),
        ("rejected", "a: rejected, never applied", "would modify 42 rows in 14 modules (rejected, never applied)"),
    ],
)
def test_a_patch_that_is_not_applied_is_told_to_have_changed_nothing(state: str, said: str, changed: str) -> None:
    report = made_report(("a",))
    written = state in {"applied", "reverted"}
    patch = replace(report.patches[0], state=state, applied_at=START if written else None)
    page = Page(render(replace(report, patches=(patch,), head=1 if state == "applied" else None)))
    assert said in page.text
    assert changed in page.text
    assert ("would modify" in page.text) is not written
    assert ("interrupted" in page.text) is False


def test_every_table_of_many_columns_keeps_a_width_on_a_narrow_screen_and_rules_are_not_broken() -> None:
    report = made_report(("a",))
    rule = RuleResult("largest_linear_share", None, 0.65, 0.05, True, "5.00 % of the parameters of linear modules")
    source = render(
        replace(report, patches=(replace(report.patches[0], gates=(rule,), policy="p 1", policy_digest="9" * 64),))
    )
    (screen,) = re.findall(r"@media screen \{\n(.*?)\n\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    kept = re.findall(r'#([\w-]+)|\[id\^="([\w-]+)"\]', screen)
    wide = [name for name, rows in Page(source).tables.items() if len(rows[0]) >= 5]
    assert {"table-gates", "table-approvals", "table-timeline", "table-events"} <= set(wide)
    for name in wide:
        figures = re.search(rf'<table id="{name}" class="(figures|map)"', source)
        assert figures or any(name == whole or (start and name.startswith(start)) for whole, start in kept), name
    assert '<span class="whole">largest_linear_share</span>' in source
    assert '<code class="whole">' in source


def test_findings_stand_at_the_top_and_beside_the_ledger() -> None:
    page = Page(render(made_report(verified=False)))
    assert "not verified: 1 finding" in page.text
    assert page.text.count("its hash is not that of its content") == 2
    assert "file contents" in page.text


def test_approvals_are_listed_and_patches_without_one_named() -> None:
    page = Page(render(made_report(("a", "b", "c"))))
    assert page.tables["table-approvals"][1] == ["1|a", "approved", "boss of a", "2030-01-02 04:04:05 UTC", "fine by a"]
    assert "Applied without a recorded decision: patch 2." in page.text


def test_a_large_model_with_many_dimensions_is_shown_whole() -> None:
    """70B: 80 blocks of 7 kinds of module; 12 dimensions."""
    names = tuple(f"dimension {number}" for number in range(1, 13))
    report = made_report(names, blocks=80)
    source = render(report)
    page = Page(source)
    require_readable(page)
    assert len(source) < 8_000_000
    assert [row[0] for row in page.tables["table-map"][1:]] == [*map(str, range(80)), "left"]
    assert page.tables["table-map"][0][1:8] == list(KINDS)
    for patch in report.patches:
        rows = page.tables[f"table-modules-{patch.patch}"][1:]
        assert [row[0] for row in rows] == [module.module for module in patch.modules]
        assert rows[0][1:] == ["3", "0", "24,576", "2", "2.1", "0.5", "25.0 %"]
    shown = [page.tables[name][0][2:] for name in ("table-harmfulness", "table-harmfulness-2", "table-harmfulness-3")]
    assert [len(columns) for columns in shown] == [5, 5, 2]
    assert [cell.split("|")[0] for columns in shown for cell in columns] == list(names)
    assert [row[:2] for row in page.tables["table-layers-1"][1:]][79] == ["79", "0.690"]
    assert len(page.tables["table-choices-2"]) == 561


def test_more_dimensions_than_colours_differ_in_their_pattern() -> None:
    source = render(made_report(tuple(f"dimension {number}" for number in range(20))))
    fills = re.findall(r'<pattern id="fill-\d+" (.*?)</pattern>', source)
    assert len(fills) == len(set(fills)) == 20


def test_capacity_left_adds_up() -> None:
    report = made_report(("animals",), blocks=3)
    page = Page(render(report))
    assert report.protection.left == 3 * 7 * 4096
    assert page.tables["table-map"][-1] == ["left", *["12,288"] * 7, "86,016"]
    assert page.tables["table-map"][1][-1] == "28,672"
    assert page.tables["table-map"][1][1] == (
        "50.0 % |4,096 left of 8,192 neurons: animals 4,096; 2,048 of them selected for another dimension too"
    )


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_colours_have_the_contrast_of_wcag_aa(scheme: str) -> None:
    colours = next(colours for name, colours in _palettes() if name == scheme)
    for ground in GROUNDS:
        for name in TEXT:
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in GRAPHICS:
            assert _contrast(colours[name], colours[ground]) >= 3, (name, ground)


def test_every_colour_of_the_style_sheet_is_among_those_whose_contrast_is_checked() -> None:
    style = STYLE.read_text(encoding="utf-8")
    rules = re.sub(r":root \{.*?\}", "", style, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-f]{3,8}\b|rgba?\(|hsla?\(", rules), "colours are named at the top"
    assert set(re.findall(r"[;{ ]color: var\(--(\w+)\)", rules)) <= set(TEXT)
    drawn = set(re.findall(r"(?:fill|stroke|outline|border[a-z-]*): [^;}]*var\(--(\w+)\)", rules)) - {"c"}
    assert drawn <= {*GRAPHICS, *TEXT, *DECORATION}
    assert set(re.findall(r"--c: var\(--(\w+)\)", rules)) <= set(GRAPHICS)
    assert set(re.findall(r"background: var\(--(\w+)\)", rules)) <= set(GROUNDS)


def _palettes() -> Iterator[tuple[str, dict[str, str]]]:
    style = STYLE.read_text(encoding="utf-8")
    found = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for name, block in zip(("light", "dark", "print"), found, strict=True):
        yield name, dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6})", block))


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
