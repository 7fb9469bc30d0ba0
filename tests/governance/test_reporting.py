"""The report shows what the registry holds, names what is missing, and reads without script, network or colour."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from governance.errors import InputError, PlanError
from governance.evaluation import EvaluationRequest, evaluate
from governance.identification import run_identification
from governance.lineages import create_lineage
from governance.patch_records import list_patches, show_patch
from governance.patching import apply_patch, revert_patch
from governance.planning import plan_patch
from governance.prompt_sets import PromptSource
from governance.report_charts import HEIGHT, WIDTH, rate_panels
from governance.report_data import gather
from governance.report_figures import Control, Figure, FigureTable, Quantity, Stage, StageFigures
from governance.reporting import write_report
from governance.workspace import Workspace
from registry.errors import RecordNotFoundError
from tests.governance.scenarios import Scenario, settings_of

VOID = {"meta", "link", "br", "img", "input", "hr", "rect", "circle", "line", "path"}
HOSTILE = "<script>alert('x')</script> & more"


@dataclass
class Page(HTMLParser):
    """What a reader finds on the page: elements, identifiers, and tables as rows of text by identifier."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.table: list[list[str]] = []
        self.in_cell = False
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(found.get("id") or "", [])
        elif tag == "tr":
            self.table.append([])
        elif tag in {"td", "th"}:
            self.in_cell = True
            self.table[-1].append("")
        elif tag in {"small", "br"} and self.in_cell:
            self.table[-1][-1] += "|"

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag, "elements are nested rightly"
        if tag in {"td", "th"}:
            self.in_cell = False
            self.table[-1][-1] = " ".join(self.table[-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.table[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(re.sub(r"<[^>]+>", " ", self.source).split())

    def row(self, table: str, first: str) -> list[str]:
        return next(row for row in self.tables[table] if row[0].startswith(first))


def read_page(workspace: Workspace, lineage: str, place: Path) -> Page:
    return Page(write_report(workspace, lineage, place / "report.html").read_text(encoding="utf-8"))


def accuracy_prompts(place: Path) -> PromptSource:
    file = place / "task.jsonl"
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad", "water")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptSource(str(file), answer_column="response")


@pytest.fixture
def patched(scenario: Scenario, tmp_path: Path) -> Scenario:
    """Two patches, the second reverted; every stage measured; a control; a refused change."""
    workspace, task = scenario.workspace, accuracy_prompts(tmp_path)

    def measure(lineage: str, stage: str) -> None:
        evaluate(
            workspace,
            lineage,
            EvaluationRequest(model=stage, dimensions=("animals",), accuracy={"task_accuracy": task}, max_new_tokens=3),
        )

    for stage in ("base", "aligned", "subject"):
        measure("line", stage)
    for dimension in ("animals", "weapons"):
        scenario.apply(dimension)
        measure("line", "head")
    create_lineage(workspace, "chance", subject="subject", aligned="aligned", base="base")
    found = run_identification(workspace, "chance", "animals", settings_of(score="random"))
    apply_patch(workspace, plan_patch(workspace, "chance", found.identification), reason="control")
    measure("chance", "head")
    revert_patch(workspace, "line", 2, reason=HOSTILE)
    with pytest.raises(PlanError):
        revert_patch(workspace, "line", 2)
    return scenario


@pytest.fixture
def page(patched: Scenario, tmp_path: Path) -> Page:
    return read_page(patched.workspace, "line", tmp_path)


def test_patch_table_holds_the_figures_of_patch_list(patched: Scenario, page: Page) -> None:
    shown = page.tables["table-patches"][1:]
    assert len(shown) == 2
    for row, patch in zip(shown, list_patches(patched.workspace, "line"), strict=True):
        assert row[:8] == [
            str(patch.patch),
            patch.dimension,
            patch.state,
            f"{patch.neurons_selected:,}",
            f"{patch.neurons_already_protected:,}",
            f"{patch.neurons_modified:,}",
            f"{100 * patch.modified_share:.2f} %",
            f"{100 * patch.modified_linear_share:.2f} %",
        ]
        for digest in (patch.digest_before, patch.digest_after, patch.artifact):
            assert digest is not None
            assert digest in page.source


def test_figures_are_those_of_evaluate(patched: Scenario, page: Page, tmp_path: Path) -> None:
    """Measured once more, the head and the subject give what the tables show."""
    task = accuracy_prompts(tmp_path)
    for stage, label in (("subject", "subject"), ("head", "after patch 1")):
        request = EvaluationRequest(
            model=stage, dimensions=("animals",), accuracy={"task_accuracy": task}, max_new_tokens=3
        )
        harm, accuracy = evaluate(patched.workspace, "line", request)
        for table, figure in (("table-harmfulness", harm), ("table-accuracy", accuracy)):
            assert page.row(table, label)[2] == (
                f"{figure.value:.1f}|{figure.interval_low:.1f} to {figure.interval_high:.1f}; "
                f"{figure.numerator} of {figure.n}"
            )
    again = read_page(patched.workspace, "line", tmp_path)
    assert again.tables["table-harmfulness"] == page.tables["table-harmfulness"]
    assert "2 earlier figures of the same states" in again.text


def test_stages_are_named_and_their_shares_add_up(patched: Scenario, page: Page) -> None:
    first, second = list_patches(patched.workspace, "line")
    own = [row[:2] for row in page.tables["table-harmfulness"][1:6]]
    both = 100 * (first.modified_share + second.modified_share)
    assert own == [
        ["base", "–not applicable"],
        ["aligned", "–not applicable"],
        ["subject", "–not applicable"],
        ["after patch 1 (head now)|animals", f"{100 * first.modified_share:.2f} %"],
        ["after patch 2 (reverted since)|weapons", f"{both:.2f} %"],
    ]


def test_judge_is_named_and_told_apart_from_a_trained_one(page: Page) -> None:
    assert "advbench-phrases 1" in page.tables["table-harmfulness"][0][2]
    assert "is not a trained judge" in page.text
    assert "not a compliance determination" in page.text


def test_lineage_with_random_neurons_on_the_same_subject_is_the_control(patched: Scenario, page: Page) -> None:
    (control,) = list_patches(patched.workspace, "chance")
    assert page.row("table-harmfulness", "Control: random neurons")[0].endswith("(lineage chance)")
    assert page.tables["table-harmfulness"][7][1] == f"{100 * control.modified_share:.2f} %"
    assert page.tables["table-control-1"][1][3] == f"{control.neurons_selected:,}"


def test_lineage_with_chosen_neurons_is_no_control(patched: Scenario, tmp_path: Path) -> None:
    found = read_page(patched.workspace, "chance", tmp_path)
    assert "This lineage is a control" in found.text
    assert "Control: random neurons" not in found.text


@pytest.mark.parametrize(
    ("shares", "same"), [((0.1, 0.2), True), ((0.099, 0.2), True), ((0.1, 0.3), False), ((), False)]
)
def test_control_is_said_to_have_the_same_share_only_if_it_has(shares: tuple[float, ...], same: bool) -> None:
    def rows(values: tuple[float, ...]) -> tuple[StageFigures, ...]:
        stages = [Stage("after", "", number, "a", share, False, False) for number, share in enumerate(values, 1)]
        return tuple(StageFigures(stage, ()) for stage in stages)

    assert Control("chance", rows(shares)).same_share(rows((0.1, 0.2))) is same


def test_overlap_names_the_protecting_dimension(patched: Scenario, page: Page) -> None:
    _, second = list_patches(patched.workspace, "line")
    row = page.row("table-overlap", "weapons")
    assert second.neurons_already_protected > 0
    share = 100 * second.neurons_already_protected / second.neurons_selected
    assert row[1] == f"{second.neurons_selected:,}"
    assert row[3] == f"animals {second.neurons_already_protected:,} ({share:.1f} %)"
    assert row[4].split("|")[0] == f"{second.neurons_already_protected:,}"
    assert row[5].split("|")[0] == f"{second.neurons_modified:,}"


def test_map_counts_the_claims(patched: Scenario) -> None:
    report = gather(patched.workspace, "line")
    claims = patched.claims()
    cells = {(block, cell.kind): cell for block, row in report.protection.blocks for cell in row}
    assert report.protection.protected == sum(len(rows) for rows in claims.values())
    for module, rows in claims.items():
        block, kind = int(module.split(".")[2]), module.split(".")[-1]
        assert cells[block, kind].protected == len(rows)
        assert [part.dimension for part in cells[block, kind].parts] == ["animals"]
        assert cells[block, kind].share <= report.protection.scale


def test_modules_of_every_patch_are_those_of_patch_show(patched: Scenario, page: Page) -> None:
    for number in (1, 2):
        _, changes = show_patch(patched.workspace, "line", number)
        shown = page.tables[f"table-modules-{number}"][1:]
        assert [(row[0], row[1], row[2]) for row in shown] == [
            (change.module, f"{change.rows:,}", f"{change.rows_unchanged:,}") for change in changes
        ]


def test_text_of_the_registry_is_escaped(page: Page) -> None:
    assert "<script" not in page.source
    assert "&lt;script&gt;" in page.source


def test_refused_change_is_listed(page: Page) -> None:
    (row,) = [row for row in page.tables["table-timeline"] if row[1].startswith("refused")]
    assert row[1] == "refused: patch revert"
    assert row[4].startswith("PlanError: ")


def test_ledger_proof_is_that_of_the_registry(patched: Scenario, page: Page) -> None:
    exported = patched.workspace.registry.heads.path.read_text(encoding="utf-8").splitlines()[-1]
    assert exported.replace('"', "&#34;") in page.source
    assert json.loads(exported)["hash"] in page.text
    assert "verified" in page.text
    assert "not verified" not in page.text


def test_broken_ledger_is_shown_as_not_verified(patched: Scenario, tmp_path: Path) -> None:
    with patched.workspace.registry.heads.path.open("a", encoding="utf-8") as heads:
        heads.write('{"at":"2030-01-01T00:00:00.000000Z","count":9999,"hash":"' + "0" * 64 + '"}\n')
    found = read_page(patched.workspace, "line", tmp_path)
    assert "not verified: 1 finding" in found.text
    assert "its end is cut off" in found.text
    assert "It is not the head of this ledger" in found.text


def test_changed_weights_are_shown_as_not_verified(patched: Scenario, tmp_path: Path) -> None:
    weights = next(patched.working.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert "not verified" in read_page(patched.workspace, "line", tmp_path).text


def test_lineage_without_anything_says_what_is_missing(scenario: Scenario, tmp_path: Path) -> None:
    found = read_page(scenario.workspace, "line", tmp_path)
    for sentence in (
        "Harmfulness was not measured for this lineage",
        "Neither accuracy nor over-refusal was measured",
        "No patch is recorded",
        "No neuron is protected at present",
        "No identification is recorded",
        "No refused change of this lineage is recorded",
        "No control with random neurons is recorded",
    ):
        assert sentence in found.text


def test_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name == "src" or name.startswith("on")}
        assert (attributes.get("href") or "#").startswith("#")
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert set(re.findall(r"url\(.", page.source)) == {"url(#"}


def test_place_on_the_disk_is_not_handed_on(page: Page, tmp_path: Path) -> None:
    assert str(tmp_path) not in page.source
    assert "/tmp" not in page.source


def test_page_can_be_read_without_seeing_it(page: Page) -> None:
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.elements:
        if tag == "th":
            assert attributes.get("scope") in {"col", "row", "rowgroup"}
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in identifiers
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in identifiers
        if attributes.get("role") == "region":
            assert attributes.get("tabindex") == "0"
            assert attributes.get("aria-label")
    captions = sum(tag == "caption" for tag, _ in page.elements)
    assert captions == sum(tag == "table" for tag, _ in page.elements)


def test_unknown_lineage_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    with pytest.raises(RecordNotFoundError):
        write_report(scenario.workspace, "nobody", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_place_that_cannot_be_written_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        write_report(scenario.workspace, "line", tmp_path / "file" / "report.html")


def test_date_of_generation_is_the_clock_of_the_workspace(scenario: Scenario, tmp_path: Path) -> None:
    still = Workspace(scenario.workspace.registry, "tester", clock=lambda: datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC))
    first = write_report(still, "line", tmp_path / "one.html").read_bytes()
    assert b"2031-02-03" in first
    assert write_report(still, "line", tmp_path / "two.html").read_bytes() == first


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_colours_have_the_contrast_of_wcag_aa(scheme: str) -> None:
    colours = next(colours for name, colours in _palettes() if name == scheme)
    for name in ("ink", "muted", "link", "good", "bad"):
        for ground in ("page", "tint"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("control", *(f"d{number}" for number in range(8))):
        assert _contrast(colours[name], colours["page"]) >= 3, name


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


def _palettes() -> Iterator[tuple[str, dict[str, str]]]:
    import governance

    style = (Path(governance.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
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
