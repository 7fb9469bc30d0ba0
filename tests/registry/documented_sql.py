"""The SQL of docs/registry.md."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
QUERIES: tuple[str, ...] = tuple(query.strip() for block in _BLOCKS for query in block.split(";") if query.strip())
STAGES = re.compile(
    "|".join(
        stage.replace(" N", r" \d+")
        for line in PAGE.splitlines()
        if line.startswith("| `v_evaluations`")
        for stage in re.findall(r"`([^`]+)`", line.split("|")[2])
        if stage != "stage"
    )
)
"""What the page says that stands in `v_evaluations.stage`."""


def query_title(query: str) -> str:
    """The comment over a query."""
    return query.splitlines()[0].lstrip("- ")
