"""Reading back what an identification stored: one error, whatever is missing or damaged."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from algorithms.errors import SettingsError


@contextmanager
def readable() -> Iterator[None]:
    """Turn a missing or wrong entry into an error that says what to do.

    Raises:
        SettingsError: an entry is missing, of the wrong type, or no valid settings.
    """
    try:
        yield
    except (KeyError, TypeError, ValidationError) as broken:
        raise unreadable(str(broken)) from broken


def unreadable(problem: str) -> SettingsError:
    """The error of a stored identification that cannot be read."""
    return SettingsError(f"A stored identification cannot be read ({problem})", "Identify again with this version")
