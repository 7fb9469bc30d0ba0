"""`neuronledger model`: register checkpoints and adapters, list them, merge an adapter, write cards."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from governance.commands.cards import bom, card
from governance.commands.options import json_option, list_options, workspace_options, writing_workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.group(short_help="Register checkpoints and LoRA adapters.")
def model() -> None:
    """Register checkpoints and LoRA adapters, with the digest of every tensor."""


model.add_command(card)
model.add_command(bom)


@model.command("register", short_help="Register a directory of safetensors files.")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--role",
    required=True,
    type=click.Choice(["base", "aligned", "subject", "reference"]),
    help="base: before alignment; aligned: refuses harm; subject: fine-tuned; reference: super-aligned.",
)
@click.option("--base-model", metavar="NAME", help="For an adapter: the registered checkpoint that it adapts.")
@json_option
@writing_workspace_options
def register(
    workspace: "Workspace",
    name: str,
    path: Path,
    role: Literal["base", "aligned", "subject", "reference"],
    base_model: str | None,
    as_json: bool,
) -> None:
    """Register the model at PATH, a directory of safetensors files or of a PEFT LoRA adapter.

    \b
    Examples:
      neuronledger model register base ./Llama-3.1-8B --role base
      neuronledger model register chat ./Llama-3.1-8B-Instruct --role aligned
      neuronledger model register mine ./my-lora --role subject --base-model chat
    """
    from governance.catalogue import register_model
    from governance.commands.rendering import emit

    summary = register_model(workspace, name, path, role, base_model)
    emit(
        summary,
        as_json,
        lambda: click.echo(
            f"Registered {summary.role} model {summary.name}: {summary.architecture} {summary.kind}, "
            f"{summary.parameters:,} parameters, {summary.neurons:,} neurons in {summary.modules} linear modules "
            f"({100 * summary.linear_parameters / summary.parameters:.1f} % of parameters), "
            f"digest {summary.state_digest[:16]}…"
        ),
    )


@model.command("list")
@list_options
@workspace_options
def list_(workspace: "Workspace", as_json: bool, as_csv: bool) -> None:
    """List the registered models."""
    from governance.catalogue import list_models
    from governance.commands.rendering import emit_list, table

    models = list_models(workspace)
    emit_list(
        models,
        as_json,
        as_csv,
        lambda: table(
            "Models",
            ["name", "role", "kind", "architecture", "parameters", "neurons", "digest", "path"],
            [
                [
                    m.name,
                    m.role,
                    m.kind,
                    m.architecture,
                    f"{m.parameters:,}",
                    f"{m.neurons:,}",
                    m.state_digest[:12],
                    m.path,
                ]
                for m in models
            ],
            right=["parameters", "neurons"],
        ),
    )


@model.command("merge", short_help="Merge a LoRA adapter into its checkpoint.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@json_option
def merge(base: Path, adapter: Path, output: Path, as_json: bool) -> None:
    """Merge the LoRA adapter at ADAPTER into the checkpoint at BASE and write the full checkpoint OUTPUT.

    For operations that a LoRA adapter cannot hold (setting `entries`, target `full`). Arithmetic is float32, rounded
    once to the checkpoint's dtype.

    \b
    Example:
      neuronledger model merge ./Llama-3.1-8B-Instruct ./my-lora ./merged
    """
    from algorithms.merging import merge_adapter
    from governance.commands.rendering import emit

    merge_adapter(base, adapter, output)
    emit({"merged": output}, as_json, lambda: click.echo(f"Merged {adapter} into {base}: {output}"))
