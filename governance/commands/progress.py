"""A progress bar on stderr, off when stderr is not a terminal."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from governance.workspace import Progress


def terminal_progress() -> "Progress":
    """Return a progress callback that draws on a terminal and does nothing elsewhere."""
    from governance.workspace import no_progress

    return _draw if sys.stderr.isatty() else no_progress


def _draw(what: str, done: int, total: int) -> None:
    width = 30
    filled = width * done // max(total, 1)
    line = f"\r{what:<40.40} [{'█' * filled}{' ' * (width - filled)}] {done}/{total}"
    sys.stderr.write(line if done < total else "\r" + " " * len(line) + "\r")
    sys.stderr.flush()
