"""Text of the registry in a Markdown page: shown as it is, never read as Markdown, HTML, a link or a mention."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup

from governance import report_text
from governance.report_figures import Figure

_HEXADECIMAL = re.compile(r"[0-9a-f]{8,128}")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "@": "&#64;"}
_SPECIAL = re.compile(r"[&<>|@\\`*_{}\[\]#~$]|:(?=\S)|\.(?=\w)")  # the last two: what makes a link of a bare address
_JOINERS = "\u200c\u200d"


def escaped(value: Any) -> Any:
    """Escape text for the inside of a line or of a table's cell; what is marked as Markdown, and numbers, pass."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    line = "".join(_shown(character) for character in " ".join(value.split()))
    return Markup(_SPECIAL.sub(_escape, report_text.isolated(line)))  # noqa: S704  every special character is escaped


def digest(value: str | None) -> Markup:
    """A digest as code; anything else that stands in its place, escaped."""
    if value is None:
        return Markup("not recorded")
    return Markup(f"`{value}`") if _HEXADECIMAL.fullmatch(value) else Markup(escaped(value))  # noqa: S704


def fenced(lines: Iterable[str], language: str) -> Markup:
    """A block of code that nothing in it can end."""
    text = "\n".join("".join(_shown(character) for character in line) for line in lines)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}{language}\n{text}\n{fence}")  # noqa: S704  Markdown shows a fenced block as it is


def figure(found: Figure | None) -> Markup:
    """A rate in percent with what it was counted from and its interval."""
    if found is None:
        return Markup("not measured")
    counted = f"{found.numerator} of {found.n}" if found.n else "n not recorded"
    interval = f"; {report_text.rate(found.low)} to {report_text.rate(found.high)}" if found.low is not None else ""
    return Markup(f"{report_text.rate(found.value)} % ({counted}{interval})")  # noqa: S704  numbers only


def _escape(found: re.Match[str]) -> str:
    return _ENTITIES.get(found[0], "\\" + found[0])


def _shown(character: str) -> str:
    """A character that has a shape, or the sign for one that has none: it could turn the line round or hide text."""
    return character if character.isprintable() or character in _JOINERS else "\ufffd"


def _plain(write: Callable[..., str]) -> Callable[..., Markup]:
    """A filter of the report whose result is numbers and our own words."""
    return lambda *arguments: Markup(write(*arguments))  # noqa: S704


FILTERS: dict[str, Callable[..., Markup]] = {
    "share": _plain(report_text.share),
    "number": _plain(report_text.number),
    "time": _plain(report_text.time),
    "count_of": _plain(report_text.count),
    "digest": digest,
    "fenced": fenced,
    "figure": figure,
}
"""The filters of the templates, by name."""
