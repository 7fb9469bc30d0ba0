"""A report's page as a reader finds it: elements, identifiers, and tables as rows of text."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from governance.reporting import write_report
from governance.workspace import Workspace

VOID = {"meta", "link", "br", "img", "input", "hr", "rect", "circle", "line", "path"}


@dataclass
class Page(HTMLParser):
    """What a reader finds on the page: elements, identifiers, and tables as rows of text by identifier."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    around: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.table: list[list[str]] = []
        self.in_cell = False
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        self.around.append(tuple(self.open))
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
            self.table[-1][-1] = " ".join(self.table[-1][-1].strip("\u2068\u2069").split())

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
        if self.in_cell:
            self.table[-1][-1] += data

    @property
    def words(self) -> str:
        """All that is written on the page, without its tags."""
        return "".join(self.pieces)

    @property
    def text(self) -> str:
        return " ".join(re.sub(r"<[^>]+>", " ", self.source).split())

    def row(self, table: str, first: str) -> list[str]:
        return next(row for row in self.tables[table] if row[0].startswith(first))


def read_page(workspace: Workspace, lineage: str, place: Path) -> Page:
    return Page(write_report(workspace, lineage, place / "report.html").read_text(encoding="utf-8"))


def require_readable(page: Page) -> None:
    """The page loads and runs nothing, and whoever sees no picture or colour, or has only a keyboard, can read it."""
    _require_self_contained(page)
    assert next(attributes for tag, attributes in page.elements if tag == "html").get("lang")
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for (tag, attributes), around in zip(page.elements, page.around, strict=True):
        if tag == "th":
            assert attributes.get("scope") in {"col", "row", "rowgroup"}
        if tag == "svg":
            _require_alternative(attributes, around)
        if tag == "title" and "svg" not in around:
            assert around == ("html", "head")
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in identifiers
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in identifiers
        if attributes.get("role") == "region":
            assert attributes.get("tabindex") == "0"
            assert attributes.get("aria-label")
    tags = [tag for tag, _ in page.elements]
    assert tags.count("caption") == tags.count("table")
    assert tags.count("summary") == tags.count("details")
    assert tags.count("main") == tags.count("h1") == 1
    levels = [int(tag[1]) for tag in tags if tag in {"h1", "h2", "h3", "h4", "h5", "h6"}]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels)), "no heading level is left out"


def _require_self_contained(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "video", "audio", "use"}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name in {"src", "srcset", "style"} or name.startswith("on")}
        assert (attributes.get("href") or "#").startswith("#")
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "@import" not in page.source
    assert set(re.findall(r"url\(.", page.source)) <= {"url(#"}


def _require_alternative(attributes: dict[str, str | None], around: tuple[str, ...]) -> None:
    """A chart has a title and a description; every other drawing stands in a cell, list or sentence that says it."""
    if attributes.get("role") == "img":
        assert len((attributes.get("aria-labelledby") or "").split()) == 2
    else:
        assert attributes.get("aria-hidden") == "true"
        assert {"td", "th", "li", "p"} & set(around) or attributes.get("class") == "fills"
