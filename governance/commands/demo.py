"""`neuronledger demo`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option

if TYPE_CHECKING:
    from governance.demo import DemoSummary
    from governance.demo_steps import PatchFigures, StageFigures


@click.command(short_help="The whole path on a small model made on the spot.")
@click.option(
    "--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="Directory to work in."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of models and draws.")
@json_option
def demo(output: Path, seed: int, as_json: bool) -> None:
    """Make a small model, break its safety by fine-tuning, patch three dimensions, audit, and take a patch back.

    The patches are FGSN's; NLSR patches a lineage of its own, and both methods patch a third one.

    Needs no download and no GPU; about two minutes on two cores. The model speaks an invented language: no harmful
    text is involved.
    """
    from governance.commands.progress import terminal_progress
    from governance.commands.rendering import emit
    from governance.demo import run_demo

    summary = run_demo(
        output.resolve(),
        seed=seed,
        say=lambda sentence: click.echo(sentence, err=as_json),
        progress=terminal_progress(),
    )
    emit(summary, as_json, lambda: _show(summary))
    sound = summary.ledger["verified"] and summary.evidence["verified"] and all(summary.weights.values())
    if not (sound and summary.nlsr.claims.proves and summary.gates.hold):
        raise SystemExit(1)


def _show(summary: "DemoSummary") -> None:
    from governance.commands.rendering import table
    from governance.demo_nlsr import COMBINED_SPARSITY

    dimensions = list(summary.stages[0].harmfulness)

    def row(stage: "StageFigures", change: str) -> list[str]:
        harm = [f"{stage.harmfulness[name]:.1f}" for name in dimensions]
        rest = [f"{value:.1f}" for value in (stage.benign_accuracy, stage.task_accuracy, stage.over_refusal)]
        return [stage.stage, change, *harm, *rest]

    def patched(stages: "tuple[StageFigures, ...]", patches: "tuple[PatchFigures, ...]") -> list[list[str]]:
        changes = {f"after {patch.dimension}": patch for patch in patches}
        return [row(stage, _change(changes.get(stage.stage))) for stage in stages]

    counts = ", ".join(f"{name} {count}" for name, count in summary.heldout_prompts.items())
    columns = ["stage", "new / already protected neurons", *dimensions, "benign", "task", "over-refusal"]
    click.echo()
    table(
        f"Harmfulness per dimension, accuracy and over-refusal in % (held-out prompts: {counts})",
        columns,
        patched(summary.stages, summary.patches),
        right=columns[1:],
    )
    table(
        "Control: random neurons at the same share, the same operation",
        columns,
        patched(summary.control_stages, summary.control_patches),
        right=columns[1:],
    )
    nlsr = summary.nlsr
    table(
        f"NLSR, a lineage of its own ({nlsr.chosen})",
        columns,
        patched(nlsr.stages, nlsr.patches),
        right=columns[1:],
    )
    table(
        "Control of NLSR: random neurons, the same modules and the same share",
        columns,
        patched(nlsr.control_stages, nlsr.control_patches),
        right=columns[1:],
    )
    table(
        f"Both methods: FGSN for {dimensions[0]}, then NLSR with sparsity {COMBINED_SPARSITY} for {dimensions[1]}",
        columns,
        patched(nlsr.combined_stages, nlsr.combined_patches),
        right=columns[1:],
    )
    click.echo(nlsr.claims.sentence)
    gates = summary.gates
    click.echo(
        f"Gates: a patch of whole layers on full weights was {'refused' if gates.refused else 'NOT REFUSED'} "
        f"({'; '.join(gates.why)}); the files {'kept every byte' if gates.bytes_same else 'WERE CHANGED'}; "
        f"{gates.passed} ordinary patches passed."
    )
    click.echo(
        f"Ledger: {summary.ledger['events']} events, {'verified' if summary.ledger['verified'] else 'NOT VERIFIED'}."
    )
    click.echo(
        f"Weights: {'verified' if summary.weights['verified'] else 'NOT VERIFIED'}; the last patch was reverted "
        f"{'exactly' if summary.weights['reverted_exactly'] else 'NOT EXACTLY'}."
    )
    click.echo(
        f"Evidence pack: {summary.evidence['pack']}, {'verified' if summary.evidence['verified'] else 'NOT VERIFIED'}."
    )
    click.echo(
        f"Open the report: {summary.report}, and that of the lineage with both methods: {summary.combined_report}"
    )
    click.echo(f"To go on, measure the head, now without the last patch: {summary.next_command}")


def _change(patch: "PatchFigures | None") -> str:
    if patch is None:
        return ""
    return f"{patch.neurons_modified:,} / {patch.neurons_already_protected:,}"
