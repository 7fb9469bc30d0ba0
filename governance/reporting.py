"""The report of a lineage: one self-contained HTML page."""

from pathlib import Path

from governance.workspace import Workspace


def write_report(workspace: Workspace, lineage: str, output: Path) -> Path:
    """placeholder while wiring"""
    output.write_text(f"<p>{lineage} {workspace.actor}</p>")
    return output
