"""`neuronledger model card` and `neuronledger model bom`: what is published beside a patched model."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import Command, json_option, workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


def _output_options(command: Command) -> Command:
    """Add `--output` and `--force`."""
    command = click.option("--force", is_flag=True, help="Replace the file if it is there.")(command)
    return click.option(
        "--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write.  [default: print it]"
    )(command)


@click.command("card", short_help="Write the model card of a lineage.")
@click.argument("lineage")
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="What the Hugging Face Hub calls the model that it derives from.  [default: as the models' own cards say]",
)
@_output_options
@json_option
@workspace_options
def card(
    workspace: "Workspace", lineage: str, base_model: str | None, output: Path | None, force: bool, as_json: bool
) -> None:
    """Write the model card of LINEAGE's working checkpoint, with front matter for the Hugging Face Hub.

    Says what was patched, harmfulness before and now, what it cost, how it was measured, limits, and how to verify it.
    Refused where the record does not agree. Weights are not hashed.

    \b
    Examples:
      neuronledger model card support-bot
      neuronledger model card support-bot --base-model meta-llama/Llama-3.1-8B-Instruct --output README.md
    """
    from governance.model_card import model_card

    _hand_out(workspace, lineage, model_card(workspace, lineage, base_model), output, force, as_json)


@click.command("bom", short_help="Write the bill of materials (CycloneDX).")
@click.argument("lineage")
@_output_options
@json_option
@workspace_options
def bom(workspace: "Workspace", lineage: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Write the bill of materials of LINEAGE's working checkpoint: CycloneDX 1.6, an ML-BOM.

    Models, files, patches, prompt sets and figures with their digests. The same state of the lineage gives the same
    bytes. Validated against the schema before it is written. Needs pip install 'neuronledger[cards]'.

    \b
    Example:
      neuronledger model bom support-bot --output bom.json
    """
    from governance.bill_of_materials import bill_of_materials

    _hand_out(workspace, lineage, bill_of_materials(workspace, lineage), output, force, as_json)


def _hand_out(
    workspace: "Workspace", lineage: str, content: str, output: Path | None, force: bool, as_json: bool
) -> None:
    """Print what was made, or write it and say where."""
    from governance.card_data import write_text
    from governance.commands.rendering import emit

    if output is None:
        emit({"lineage": lineage, "content": content}, as_json, lambda: click.echo(content, nl=False))
        return
    path = write_text(workspace, content, output, force=force)
    emit({"lineage": lineage, "output": path}, as_json, lambda: click.echo(f"Wrote {path}"))
