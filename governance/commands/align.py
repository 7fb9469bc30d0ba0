"""`neuronledger align`: train the aligned model where there is none."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from governance.commands.options import json_option, pairs, writing_workspace_options
from governance.commands.settings import GivenSettings, given_settings_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.command(short_help="Train an aligned adapter, where you have no aligned model.")
@click.argument("name")
@click.option("--base", required=True, metavar="NAME", help="The registered full checkpoint to align.")
@click.option(
    "--method",
    required=True,
    type=click.Choice(["dpo", "kto", "orpo", "sft"]),
    help="dpo and orpo learn from pairs, kto from good and bad answers, sft from good answers alone.",
)
@click.option(
    "--data",
    required=True,
    metavar="SOURCE",
    help="The rows. Columns: prompt, chosen, rejected (dpo, orpo, kto); prompt, completion, label (kto); prompt, "
    "response (sft).",
)
@click.option(
    "--where",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Keep rows only where FIELD (dots reach into objects) is VALUE, or a list that holds it. Repeatable; all must "
    "hold.",
)
@click.option(
    "--column",
    multiple=True,
    metavar="KEY=NAME",
    help="Name of a column that is called otherwise, such as response=chosen. Repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Read at most so many rows.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to make.  [default: aligned/NAME beside the registry]",
)
@given_settings_options
@json_option
@writing_workspace_options
def align(
    workspace: "Workspace",
    name: str,
    base: str,
    method: Literal["dpo", "kto", "orpo", "sft"],
    data: str,
    where: tuple[str, ...],
    column: tuple[str, ...],
    limit: int | None,
    output: Path | None,
    given: GivenSettings,
    as_json: bool,
) -> None:
    """Train a LoRA adapter on a base with trl, and register it as the aligned model NAME.

    For those who have no aligned model; who has one registers it. A SOURCE is what dimension register takes. Settings,
    seed, versions, losses, and the digest of the rows are recorded, none of their text. Evaluate the model before you
    build on it. Needs the extra neuronledger[align].

    \b
    Examples:
      neuronledger align aligned --base base --method dpo --data preferences.jsonl --set epochs=3
      neuronledger align aligned --base base --method sft --data refusals.csv --column response=refusal
    """
    from algorithms.alignment_settings import alignment_settings
    from governance.alignment import align_model
    from governance.alignment_data import AlignmentSource
    from governance.commands.rendering import emit

    source = AlignmentSource(
        location=data,
        where=tuple(pairs(where, "--where", "FIELD=VALUE", empty=True)),
        columns=dict(pairs(column, "--column", "KEY=NAME")),
        limit=limit,
    )
    with workspace.attempt("align", "model", name):
        settings = alignment_settings(method, given.values())
    made = align_model(workspace, name, base=base, source=source, settings=settings, output=output)

    def people() -> None:
        training = made.made_from["training"]
        losses = f"loss {training['first_loss']:.3f} → {training['last_loss']:.3f}"
        click.echo(
            f"Aligned {base} as {made.model.name} by {method} (rows {training['rows']}, steps {training['steps']}, "
            f"{losses}): digest {made.model.state_digest[:16]}…, in {made.model.path}"
        )
        if left_out := training["rows_left_out"]:
            read = made.made_from["data"]["rows"]
            click.echo(f"Left out: {left_out} of {read} rows, of more than {settings.max_length} tokens.")

    emit(made, as_json, people)
