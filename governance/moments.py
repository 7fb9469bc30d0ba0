"""Times that people name: ISO 8601 dates and times, in UTC unless they say otherwise.

What is named covers a span: a date its whole day, `12:05` that minute. A question about "until" or "at" a moment is
about the end of its span, one about "since" about its beginning, so that a time copied from a table finds the event
that stands beside it.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from governance.errors import InputError
from registry.columns import format_timestamp

_CLOCK = re.compile(r"[T ](?P<hour>\d\d)(:?(?P<minute>\d\d)(:?(?P<second>\d\d)(?P<fraction>[.,]\d+)?)?)?")
_MEND = "Give a date (2026-03-01) or a time (2026-03-01T12:30, 2026-03-01T12:30:05+02:00); without a zone it is UTC"


@dataclass(frozen=True)
class Moment:
    """A named moment.

    Attributes:
        text: as it was given.
        begin, end: the first and the last microsecond of it, in UTC.
    """

    text: str
    begin: datetime
    end: datetime

    @property
    def first(self) -> str:
        """Its beginning as the registry writes times; order of text is order of time."""
        return format_timestamp(self.begin)

    @property
    def last(self) -> str:
        """Its end as the registry writes times."""
        return format_timestamp(self.end)


def parse_moment(text: str) -> Moment:
    """Read a date or a time.

    Raises:
        InputError: it is neither.
    """
    given = text.strip()
    try:
        begin = datetime.fromisoformat(given)
        begin = begin.replace(tzinfo=UTC) if begin.tzinfo is None else begin.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{text!r} is not a date or a time of ISO 8601", _MEND) from error
    return Moment(given, begin, begin + (_span(given) - timedelta(microseconds=1)))


def _span(text: str) -> timedelta:
    clock = _CLOCK.search(text)
    if clock is None:
        return timedelta(days=1)
    if clock["fraction"]:
        return timedelta(microseconds=1)
    if clock["second"]:
        return timedelta(seconds=1)
    return timedelta(minutes=1) if clock["minute"] else timedelta(hours=1)
