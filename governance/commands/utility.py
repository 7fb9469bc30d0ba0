"""`neuronledger utility`: run tasks of the lm-eval harness and record what it finds."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import list_options, placement_options, writing_workspace_options

if TYPE_CHECKING:
    from governance.evaluation import Measurement
    from governance.workspace import Workspace


@click.command(short_help="Measure general ability with the lm-eval harness.")
@click.argument("lineage")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option(
    "--model",
    metavar="NAME",
    default="head",
    show_default=True,
    help="head, subject, aligned or base of the lineage, or the name of a registered reference.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of task files of your own (YAML).",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Worked examples.  [default: what the task says]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many questions of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions at a time.")
@click.option("--chat-template", is_flag=True, help="Ask through the model's chat template.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what the harness draws.")
@list_options
@writing_workspace_options
@placement_options
def utility(
    workspace: "Workspace",
    lineage: str,
    tasks: tuple[str, ...],
    model: str,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    chat_template: bool,
    seed: int,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Run TASKs of the lm-eval harness on a model of LINEAGE and record every metric that it gives.

    Needs the extra: pip install 'neuronledger[utility]'. Tasks of the harness fetch their data from the Hub; tasks of
    your own read the files that they name.

    \b
    Examples:
      neuronledger utility support-bot arc_easy hellaswag --limit 500
      neuronledger utility support-bot my_task --include-path tasks --model aligned
    """
    from governance.commands.rendering import emit_list
    from governance.harness import HarnessSettings
    from governance.utility import measure_utility

    settings = HarnessSettings(tasks, include_path, num_fewshot, limit, batch_size, chat_template, seed)
    figures = measure_utility(workspace, lineage, model, settings)
    emit_list(figures, as_json, as_csv, lambda: _show(lineage, figures))


def _show(lineage: str, figures: "list[Measurement]") -> None:
    from governance.commands.rendering import table

    table(
        f"Utility of {lineage}",
        ["stage", "metric", "value", "95 % interval", "n"],
        [
            [
                figure.stage,
                figure.metric,
                f"{figure.value:.4g}",
                "none given"
                if figure.interval_low is None or figure.interval_high is None
                else f"{figure.interval_low:.4g} to {figure.interval_high:.4g}",
                figure.n or "",
            ]
            for figure in figures
        ],
        right=["value", "95 % interval", "n"],
    )
