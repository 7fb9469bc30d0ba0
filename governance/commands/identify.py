"""`neuronledger identify`: find the neurons of a dimension in a lineage at its head."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, writing_workspace_options
from governance.commands.settings import chosen_settings, settings_options

if TYPE_CHECKING:
    from governance.identification import IdentificationSummary
    from governance.workspace import Workspace


@click.command(short_help="Find the neurons of a dimension in a lineage.")
@click.argument("lineage")
@click.argument("dimension")
@settings_options
@json_option
@writing_workspace_options
def identify(
    workspace: "Workspace",
    lineage: str,
    dimension: str,
    method: str,
    preset: str,
    settings_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find the neurons of DIMENSION in LINEAGE at its head and record them. Nothing is modified.

    \b
    Examples:
      neuronledger identify support-bot terrorism
      neuronledger identify support-bot terrorism --preset fgsn-paper
      neuronledger identify support-bot terrorism --set budget=0.05 --set layers=10..15
    """
    from governance.commands.rendering import emit
    from governance.identification import run_identification

    del method
    with workspace.attempt("identify", "lineage", lineage):
        settings = chosen_settings(preset, settings_file, assignments)
    summary = run_identification(workspace, lineage, dimension, settings, preset)
    emit(summary, as_json, lambda: describe(summary))


def describe(summary: "IdentificationSummary") -> None:
    """Print an identification in sentences."""
    share = summary.selected_parameters / summary.linear_parameters
    click.echo(
        f"Identification {summary.identification} of {summary.dimension} in {summary.lineage} at "
        f"{'the subject' if summary.head is None else f'patch {summary.head}'}: {summary.neurons_selected:,} neurons "
        f"selected ({100 * share:.2f} % of linear parameters), {summary.neurons_already_protected:,} of them already "
        f"protected."
    )
    scope = [layer["block"] for layer in summary.layers if layer["in_scope"]]
    if len(scope) < len(summary.layers):
        click.echo(f"Blocks in scope: {', '.join(map(str, scope))} of {len(summary.layers)}.")
    if summary.overlap is not None:
        correlation = "" if summary.rank_correlation is None else f", rank correlation {summary.rank_correlation:.3f}"
        click.echo(
            f"Of the neurons that rank highest on harmful prompts {100 * summary.overlap:.1f} % rank highest on benign "
            f"prompts too{correlation}."
        )
    if summary.unreached:
        click.echo(f"{len(summary.unreached):,} modules in scope have no adapter, first {summary.unreached[0]}.")
    for warning in summary.warnings:
        click.echo(f"Warning: {warning}", err=True)
