"""`neuronledger reference`: make the super-aligned reference of NLSR."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, writing_workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.group(short_help="Make super-aligned references for NLSR.")
def reference() -> None:
    """Make super-aligned reference models for NLSR."""


@reference.command("build", short_help="Extrapolate an aligned model beyond its base.")
@click.argument("name")
@click.option("--aligned", required=True, metavar="NAME", help="The aligned model W_a.")
@click.option("--base", required=True, metavar="NAME", help="The base W_0; the checkpoint under an aligned adapter.")
@click.option(
    "--beta",
    type=click.FloatRange(min=0),
    default=0.9,
    show_default=True,
    help="Extrapolation: W_e = (1+β)·W_a − β·W_0.",
)
@click.option(
    "--mode",
    type=click.Choice(["exact", "published-code"]),
    default="exact",
    show_default=True,
    help="published-code multiplies both LoRA factors by 1.8, as the authors' code does; beta is not read.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to make.  [default: references/NAME beside the registry]",
)
@json_option
@writing_workspace_options
def build(
    workspace: "Workspace",
    name: str,
    aligned: str,
    base: str,
    beta: float,
    mode: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Extrapolate an aligned model beyond its base, and register the result as the reference NAME.

    A full checkpoint is written tensor by tensor in the aligned model's shards and dtypes, an adapter with its larger
    update. Which models it came from, and β, are recorded. Judge it before you take rows from it: a large β breaks it.

    \b
    Examples:
      neuronledger reference build super --aligned chat --base base --beta 0.3
      neuronledger patch apply support-bot terrorism --method nlsr --reference super
    """
    from algorithms.nlsr_settings import nlsr_settings
    from governance.commands.rendering import emit
    from governance.references import build_reference

    with workspace.attempt("reference.build", "model", name):
        settings = nlsr_settings("default", {"beta": beta, "mode": mode})
    summary = build_reference(workspace, name, aligned=aligned, base=base, settings=settings, output=output)

    def people() -> None:
        grown = f"β {beta:g}" if mode == "exact" else f"both factors × {settings.published_factor:g}"
        click.echo(
            f"Built reference {summary.name} from {aligned} and {base}, {grown}: {summary.architecture} "
            f"{summary.kind}, {summary.parameters:,} parameters, digest {summary.state_digest[:16]}…, in {summary.path}"
        )
        for warning in settings.warnings():
            click.echo(f"Warning: {warning}", err=True)

    emit(summary, as_json, people)
