"""`neuronledger lineage`: pair a subject with its aligned and base models."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, list_options, workspace_options, writing_workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.group(short_help="Pair a subject with its aligned and base models.")
def lineage() -> None:
    """Pair a subject with its aligned and base models; patches go to the lineage's working checkpoint."""


@lineage.command("create", short_help="Create a lineage and its working checkpoint.")
@click.argument("name")
@click.option("--subject", required=True, metavar="MODEL", help="The fine-tuned model to protect.")
@click.option("--aligned", required=True, metavar="MODEL", help="The aligned model that it was fine-tuned from.")
@click.option("--base", required=True, metavar="MODEL", help="The model before alignment.")
@click.option(
    "--working",
    type=click.Path(path_type=Path),
    help="Directory for the working checkpoint.  [default: lineages/NAME beside the registry]",
)
@json_option
@writing_workspace_options
def create(
    workspace: "Workspace",
    name: str,
    subject: str,
    aligned: str,
    base: str,
    working: Path | None,
    as_json: bool,
) -> None:
    """Create the lineage NAME and its working checkpoint, a copy of the subject. The subject is never written.

    \b
    Example:
      neuronledger lineage create support-bot --subject mine --aligned chat --base base
    """
    from governance.commands.rendering import emit
    from governance.lineages import create_lineage

    summary = create_lineage(workspace, name, subject=subject, aligned=aligned, base=base, working=working)
    emit(
        summary,
        as_json,
        lambda: click.echo(f"Created lineage {summary.name}; its working checkpoint is {summary.working_path}."),
    )


@lineage.command("list")
@list_options
@workspace_options
def list_(workspace: "Workspace", as_json: bool, as_csv: bool) -> None:
    """List the lineages with their heads."""
    from governance.commands.rendering import emit_list, table
    from governance.lineages import list_lineages

    lineages = list_lineages(workspace)
    emit_list(
        lineages,
        as_json,
        as_csv,
        lambda: table(
            "Lineages",
            ["name", "subject", "aligned", "base", "head", "patches", "protected", "working checkpoint"],
            [
                [
                    line.name,
                    line.subject,
                    line.aligned,
                    line.base,
                    "subject" if line.head is None else f"patch {line.head}",
                    line.applied_patches,
                    f"{line.protected_neurons:,}",
                    line.working_path,
                ]
                for line in lineages
            ],
            right=["patches", "protected"],
        ),
    )
