"""How the report writes figures, times, digests and other people's words."""

from datetime import datetime
from typing import Any
from unicodedata import bidirectional

_NO_BREAK = "\u00a0"
_ISOLATE, _END = "\u2068", "\u2069"
_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN", "RLE", "RLO", "LRE", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"})


def isolated(value: Any) -> Any:
    """Keep right-to-left text of the registry from turning round what stands beside it; other values pass."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if any(bidirectional(character) in _RIGHT_TO_LEFT for character in value):
        return f"{_ISOLATE}{value}{_END}"
    return value


def share(share: float, digits: int = 2) -> str:
    """A share as a percentage, as `patch list` shows it."""
    return f"{100 * share:.{digits}f}{_NO_BREAK}%"


def rate(percent: float | None) -> str:
    """A rate in percent, as `evaluate` shows it."""
    return "not recorded" if percent is None else f"{percent:.1f}"


def number(count: int | None) -> str:
    """A count with its thousands set apart."""
    return "not recorded" if count is None else f"{count:,}"


def norm(norm: float | None) -> str:
    """A norm to four digits."""
    return "not recorded" if norm is None else f"{norm:.4g}"


def time(moment: datetime | str | None) -> str:
    """A moment in UTC to the second."""
    if moment is None:
        return "not recorded"
    text = moment if isinstance(moment, str) else moment.isoformat()
    return f"{text[:10]} {text[11:19]}{_NO_BREAK}UTC"


def short(digest: str | None) -> str:
    """The beginning of a digest."""
    return "not recorded" if not digest else f"{digest[:12]}…"


def setting(value: Any) -> str:
    """A setting's value as text."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) if value else "all"
    return str(value)


def count(number: int, word: str) -> str:
    """A number with its noun: `1 patch`, `2 patches`."""
    ending = "" if number == 1 else "es" if word.endswith("ch") else "s"
    return f"{number:,} {word}{ending}"


FILTERS = {
    "share": share,
    "rate": rate,
    "number": number,
    "norm": norm,
    "time": time,
    "short": short,
    "value": setting,
    "count_of": count,
}
"""The filters of the templates, by name."""
