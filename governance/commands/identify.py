"""`neuronledger identify`: find the neurons of a dimension in a lineage at its head."""

from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, placement_options, writing_workspace_options
from governance.commands.settings import SettingsChoice, settings_options

if TYPE_CHECKING:
    from governance.identification import IdentificationSummary
    from governance.workspace import Workspace

_RECIPE = ("mode", "beta", "published_factor")


@click.command(short_help="Find the neurons of a dimension in a lineage.")
@click.argument("lineage")
@click.argument("dimension")
@settings_options
@json_option
@writing_workspace_options
@placement_options
def identify(
    workspace: "Workspace",
    lineage: str,
    dimension: str,
    choice: "SettingsChoice",
    as_json: bool,
) -> None:
    """Find the neurons of DIMENSION in LINEAGE at its head and record them. Nothing is modified.

    \b
    Examples:
      neuronledger identify support-bot terrorism
      neuronledger identify support-bot terrorism --preset fgsn-paper
      neuronledger identify support-bot terrorism --set budget=0.05 --set layers=10..15
      neuronledger identify support-bot terrorism --set protect=directions
      neuronledger identify support-bot terrorism --method nlsr --set beta=0.3
    """
    from governance.commands.rendering import emit
    from governance.identification import run_identification

    with workspace.attempt("identify", "lineage", lineage):
        settings = choice.settings()
    summary = run_identification(workspace, lineage, dimension, settings, choice.preset)
    emit(summary, as_json, lambda: describe(summary))


def describe(summary: "IdentificationSummary") -> None:
    """Print an identification in sentences."""
    share = summary.selected_parameters / summary.linear_parameters
    found = (
        f"{summary.neurons_selected:,} neurons selected ({100 * share:.2f} % of linear parameters), "
        f"{summary.neurons_already_protected:,} of them already protected"
    )
    if summary.directions:
        found = f"{summary.directions:,} input directions, to be protected in all of their modules' unclaimed rows"
    click.echo(
        f"Identification {summary.identification} of {summary.dimension} in {summary.lineage} at "
        f"{'the subject' if summary.head is None else f'patch {summary.head}'}: {found}."
    )
    _describe_transplantation(summary)
    scope = [layer["block"] for layer in summary.layers if layer["in_scope"]]
    if len(scope) < len(summary.layers):
        click.echo(f"Blocks in scope: {', '.join(map(str, scope))} of {len(summary.layers)}.")
    if summary.overlap is not None:
        correlation = "" if summary.rank_correlation is None else f", rank correlation {summary.rank_correlation:.3f}"
        click.echo(
            f"Of the neurons that rank highest on harmful prompts {100 * summary.overlap:.1f} % rank highest on benign "
            f"prompts too{correlation}."
        )
    if summary.aligned_loss is not None and summary.head_loss is not None:
        click.echo(
            f"Loss of the safe answers: {summary.head_loss:.3f} in the head, {summary.aligned_loss:.3f} in the aligned "
            "model."
        )
        if summary.head_loss <= summary.aligned_loss and not (summary.neurons_selected or summary.directions):
            click.echo("There is nothing to take back; with stop_at = 0 the budget is used up all the same.")
    if summary.unreached:
        click.echo(f"{len(summary.unreached):,} modules in scope cannot be changed, first {summary.unreached[0]}.")
    if summary.ran:
        click.echo("The models ran with " + ", ".join(f"{name} {value}" for name, value in summary.ran.items()) + ".")
    for warning in summary.warnings:
        click.echo(f"Warning: {warning}", err=True)


def _describe_transplantation(summary: "IdentificationSummary") -> None:
    """What NLSR took its region from, and the module table of similarities, probabilities and draws."""
    from governance.commands.rendering import table

    if summary.reference is not None:
        made = ", ".join(f"{key} {value}" for key, value in summary.reference.items() if key in _RECIPE)
        click.echo(f"Reference: {summary.reference['model'] or f'extrapolated, {made}'}.")
    if summary.safe_answers is not None and summary.safe_answers["generated"]:
        counts = summary.safe_answers
        click.echo(
            f"Safe answers: {counts['given']:,} given; of {counts['generated']:,} generated {counts['kept']:,} kept by "
            f"the judge {counts['judge']}."
        )
    if summary.choices:
        table(
            "Choice of modules, the least similar to the reference first",
            ["module", "similarity", "rank", "kept with probability", "draw", "patched"],
            [
                [
                    choice["module"],
                    f"{choice['similarity']:.6f}",
                    f"{choice['rank']:g}",
                    f"{choice['kept_probability']:.3f}",
                    "" if choice["draw"] is None else f"{choice['draw']:.3f}",
                    "yes" if choice["patched"] else "no",
                ]
                for choice in sorted(summary.choices, key=lambda choice: float(choice["rank"]))
            ],
            right=["similarity", "rank", "kept with probability", "draw"],
        )
        click.echo(
            f"{sum(choice['patched'] for choice in summary.choices):,} of {len(summary.choices):,} modules are patched."
        )
