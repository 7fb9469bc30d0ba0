"""`neuronledger audit`: ask the registry, verify it, explain and rebuild the weights, write the report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.audit_heads import heads, sign, signature_lines, timestamp
from governance.commands.audit_pack import export, verify_pack
from governance.commands.audit_questions import QUESTIONS
from governance.commands.options import json_option, workspace_options
from governance.commands.verification import (
    evidence_options,
    tell_checked,
    tell_findings,
    tell_verdict,
    timestamp_lines,
)

if TYPE_CHECKING:
    from governance.explanation import Explanation
    from governance.proof_checks import Evidence
    from governance.replay import Replay
    from governance.workspace import Workspace


@click.group(short_help="Ask the registry, verify it, explain and rebuild the weights, write the report.")
def audit() -> None:
    """Ask the registry, verify record, artifacts and weights, explain and rebuild the weights, write the report."""


audit.add_command(heads)
audit.add_command(sign)
audit.add_command(timestamp)
audit.add_command(export)
audit.add_command(verify_pack)
for question in QUESTIONS:
    audit.add_command(question)


@audit.command("verify", short_help="Check ledger, heads, records, artifacts, claims, files.")
@click.option(
    "--weights", is_flag=True, help="Hash every weight file of models and working checkpoints, and every tensor."
)
@click.option(
    "--lineage", metavar="NAME", help="Records and weights of this lineage only; the ledger is checked whole."
)
@evidence_options("A key that may sign heads: a signature by any other is a finding. Repeatable.")
@json_option
@workspace_options
def verify(
    workspace: "Workspace",
    weights: bool,
    lineage: str | None,
    evidence: "Evidence",
    as_json: bool,
) -> None:
    """Check that ledger, exported heads, records, artifacts, claims and weights agree. Exits with 1 if not.

    \b
    Examples:
      neuronledger audit verify
      neuronledger audit verify --weights --lineage support-bot
      neuronledger audit verify --heads kept/ledger-heads.jsonl --public-key auditor.pub
      neuronledger audit verify --tsa-roots tsa-root.pem
    """
    from governance.auditing import verify as run
    from governance.commands.rendering import emit

    outcome = run(workspace, weights=weights, lineage=lineage, evidence=evidence)

    def people() -> None:
        tell_findings(outcome.findings)
        tell_checked(outcome.checked)
        for line in signature_lines(outcome.signed_by, outcome.unsigned_from):
            click.echo(line)
        for line in timestamp_lines(outcome.timestamps, outcome.checked["events"]):
            click.echo(line)
        tell_verdict(outcome.findings, outcome.not_checked, "the record")

    content = {"verified": outcome.verified, "checked": outcome.checked, "not_checked": outcome.not_checked}
    content |= {"signed_by": outcome.signed_by, "unsigned_from": outcome.unsigned_from}
    content |= {"timestamps": outcome.timestamps}
    emit({**content, "findings": outcome.findings}, as_json, people)
    if not outcome.verified:
        raise SystemExit(1)


@audit.command("explain")
@click.argument("lineage")
@json_option
@workspace_options
def explain(workspace: "Workspace", lineage: str, as_json: bool) -> None:
    """Tell which applied patch wrote each changed row of LINEAGE. Exits with 1 if a change has no such patch.

    Compares the working checkpoint with the subject byte for byte, believing neither sizes, times nor recorded digests
    of its files. Nothing is written.

    \b
    Examples:
      neuronledger audit explain support-bot
      neuronledger audit explain support-bot --json
    """
    from governance.commands.rendering import emit
    from governance.explanation import explain as run

    outcome = run(workspace, lineage)

    def people() -> None:
        _explanation_table(outcome)
        for finding in outcome.findings:
            click.echo(f"UNEXPLAINED {finding}", err=True)
        click.echo(
            f"Compared {outcome.bytes_compared:,} bytes of {outcome.files_compared:,} files: {outcome.rows_changed:,} "
            f"rows changed, {outcome.rows_attributed:,} of them as an applied patch wrote them."
        )
        if outcome.explained:
            click.echo("Every change is explained by an applied patch.")
        else:
            click.echo(f"{_findings(outcome.findings)}: not every change is explained by an applied patch.", err=True)

    emit({"explained": outcome.explained, **asdict(outcome)}, as_json, people)
    if not outcome.explained:
        raise SystemExit(1)


@audit.command("replay", short_help="Rebuild the head from subject and artifacts.")
@click.argument("lineage")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the rebuilt checkpoint to this empty or new directory, if it is the recorded head; also where a patch "
    "was interrupted.",
)
@json_option
@workspace_options
def replay(workspace: "Workspace", lineage: str, output: Path | None, as_json: bool) -> None:
    """Rebuild the head of LINEAGE from its subject and patch artifacts. Exits with 1 if anything differs.

    The rebuilt weights are held against the recorded digests of the head, of what was there before and after each
    applied patch, and against the working checkpoint, which is not a source: with --output a damaged one is replaced.

    \b
    Examples:
      neuronledger audit replay support-bot
      neuronledger audit replay support-bot --output rebuilt
    """
    from governance.commands.rendering import emit
    from governance.replay import replay as run

    outcome = run(workspace, lineage, output)

    def people() -> None:
        _replay_table(outcome)
        if outcome.interrupted is not None:
            click.echo(
                f"Patch {outcome.interrupted} of {lineage} was interrupted: the rebuilt head is the recorded one, from "
                "before it. Run neuronledger recover."
            )
        for finding in outcome.findings:
            click.echo(f"FAILED {finding}", err=True)
        click.echo(f"Rebuilt {outcome.tensors:,} tensors, {outcome.bytes:,} bytes, with the digest {outcome.digest}.")
        if outcome.output is not None:
            click.echo(f"Wrote {outcome.output}")
        elif output is not None:
            click.echo(f"Nothing was written to {output}: what was rebuilt is not the recorded head.", err=True)
        if outcome.agrees:
            click.echo("The rebuilt head is what was recorded and what the working checkpoint holds.")
        else:
            click.echo(
                f"{_findings(outcome.findings)}: record, rebuilt head and working checkpoint disagree.", err=True
            )

    emit({"agrees": outcome.agrees, **asdict(outcome)}, as_json, people)
    if not outcome.agrees:
        raise SystemExit(1)


@audit.command("report")
@click.argument("lineage")
@click.option(
    "--output", type=click.Path(path_type=Path), default="report.html", show_default=True, help="File to write."
)
@json_option
@workspace_options
def report(workspace: "Workspace", lineage: str, output: Path, as_json: bool) -> None:
    """Write the report of LINEAGE: one self-contained HTML page."""
    from governance.commands.rendering import emit
    from governance.reporting import write_report

    path = write_report(workspace, lineage, output)
    emit({"report": path}, as_json, lambda: click.echo(f"Wrote {path}"))


def _explanation_table(outcome: "Explanation") -> None:
    from governance.commands.rendering import table

    adapter = any(patch.appended for patch in outcome.patches)
    directed = any(patch.directions or patch.rewritten for patch in outcome.patches)
    columns = [
        "modules",
        *(["directions", "written again"] if directed else []),
        *("rows" if directed else "rows claimed", "changed", "as in the subject", "as written", "not readable"),
    ]
    table(
        f"What changed in {outcome.lineage}",
        ["patch", "dimension", *columns, *(["rows added to lora_A"] if adapter else [])],
        [
            [
                patch.patch,
                patch.dimension,
                patch.modules,
                *([patch.directions, patch.rewritten] if directed else []),
                *(patch.rows, patch.changed, patch.unchanged, patch.as_written, patch.unread),
                *([patch.appended] if adapter else []),
            ]
            for patch in outcome.patches
        ],
        right=["patch", *columns, "rows added to lora_A"],
    )
    for turn in outcome.written_in_turn:
        *before, last = turn.patches
        click.echo(
            f"{turn.rows:,} rows were written by patch {last} on what patch{'es' if len(before) > 1 else ''} "
            f"{', '.join(map(str, before))} had written."
        )


def _replay_table(outcome: "Replay") -> None:
    from governance.commands.rendering import table

    words = {True: "yes", False: "no", None: "not checked"}
    table(
        f"Recorded and rebuilt digests of {outcome.lineage}",
        ["moment", "patches applied", "recorded", "rebuilt", "agrees"],
        [
            [
                state.moment,
                ", ".join(map(str, state.patches)) or "none",
                state.recorded[:12] + "…",
                state.rebuilt[:12] + "…" if state.rebuilt else "an artifact of a reverted patch is missing",
                words[state.agrees],
            ]
            for state in outcome.states
        ],
    )


def _findings(findings: Sequence[object]) -> str:
    return "1 finding" if len(findings) == 1 else f"{len(findings):,} findings"
