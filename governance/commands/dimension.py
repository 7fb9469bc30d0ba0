"""`neuronledger dimension` (alias `concern`): register safety dimensions and list them."""

from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, list_options, pairs, workspace_options, writing_workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.group(short_help="Register safety dimensions (alias: concern).")
def dimension() -> None:
    """Register safety dimensions, such as animal abuse or terrorism, with their prompt sets."""


@dimension.command("register")
@click.argument("name")
@click.option("--harmful", required=True, metavar="SOURCE", help="Harmful prompts of this dimension.")
@click.option("--benign", required=True, metavar="SOURCE", help="Benign prompts to set them against.")
@click.option("--heldout", metavar="SOURCE", help="Harmful prompts kept for measuring; never used to identify.")
@click.option(
    "--where",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Keep rows of --harmful and --heldout only where "
    "FIELD (dots reach into objects) is VALUE, or a list that holds it. Repeatable; all must hold.",
)
@click.option("--benign-where", multiple=True, metavar="FIELD=VALUE", help="The same for --benign.")
@click.option(
    "--prompt-column",
    multiple=True,
    metavar="NAME",
    help="Column of the prompt; repeat to join several.  "
    "[default: prompt, instruction, question, text, goal or behavior]",
)
@click.option(
    "--answer-column",
    metavar="NAME",
    help="Column with the answer that should be given: the refusal of a harmful "
    "prompt, the answer to a benign one.  [default: the aligned model answers]",
)
@click.option("--drop-duplicates", is_flag=True, help="Keep the first of repeated prompts instead of refusing the set.")
@click.option("--limit", type=click.IntRange(min=1), help="Keep at most so many prompts of each set.")
@click.option("--description", default="", metavar="TEXT", help="What the concern is.")
@json_option
@writing_workspace_options
def register(
    workspace: "Workspace",
    name: str,
    harmful: str,
    benign: str,
    heldout: str | None,
    where: tuple[str, ...],
    benign_where: tuple[str, ...],
    prompt_column: tuple[str, ...],
    answer_column: str | None,
    drop_duplicates: bool,
    limit: int | None,
    description: str,
    as_json: bool,
) -> None:
    """Register the safety dimension NAME with its prompts.

    A SOURCE is a .jsonl, .json, .csv or .parquet file, a directory saved by datasets, or a Hugging Face dataset
    (owner/name or owner/name:split). The prompts are copied into the artifact store; their digests are recorded.

    \b
    Examples:
      neuronledger dimension register animal_abuse --harmful harmful.jsonl --benign benign.jsonl --heldout test.jsonl
      neuronledger dimension register terrorism --harmful qa.parquet --where category.terrorism=true \\
          --benign instructions.csv --drop-duplicates
    """
    from governance.catalogue import register_dimension
    from governance.commands.rendering import emit
    from governance.prompt_sets import PromptSource
    from registry.schema import Purpose

    def source(location: str, conditions: tuple[str, ...], answers: str | None) -> PromptSource:
        return PromptSource(
            location=location,
            where=tuple(pairs(conditions, "--where", "FIELD=VALUE", empty=True)),
            prompt_columns=prompt_column,
            answer_column=answers,
            drop_duplicates=drop_duplicates,
            limit=limit,
        )

    sources: dict[Purpose, PromptSource] = {
        "harmful": source(harmful, where, answer_column),
        "benign": source(benign, benign_where, answer_column),
    }
    if heldout is not None:
        sources["heldout"] = source(heldout, where, None)
    summary = register_dimension(workspace, name, sources, description)

    def people() -> None:
        counts = ", ".join(f"{count} {purpose}" for purpose, count in summary.prompts.items())
        click.echo(f"Registered dimension {summary.name}: {counts} prompts.")
        for purpose, dropped in summary.dropped.items():
            if dropped:
                click.echo(f"{dropped} repeated {purpose} prompts were dropped.")

    emit(summary, as_json, people)


@dimension.command("list")
@list_options
@workspace_options
def list_(workspace: "Workspace", as_json: bool, as_csv: bool) -> None:
    """List the registered dimensions."""
    from governance.catalogue import list_dimensions
    from governance.commands.rendering import emit_list, table

    dimensions = list_dimensions(workspace)
    emit_list(
        dimensions,
        as_json,
        as_csv,
        lambda: table(
            "Safety dimensions",
            ["name", "harmful", "benign", "heldout", "description"],
            [
                [d.name, d.prompts.get("harmful"), d.prompts.get("benign"), d.prompts.get("heldout", 0), d.description]
                for d in dimensions
            ],
            right=["harmful", "benign", "heldout"],
        ),
    )
