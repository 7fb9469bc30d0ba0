"""`neuronledger audit`: read the ledger, verify it, write the report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, list_options, workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.group(short_help="Read the ledger, verify it, write the report.")
def audit() -> None:
    """Read the ledger, verify record, artifacts and weights, write the report."""


@audit.command("log")
@click.option("--action", "actions", multiple=True, metavar="PREFIX", help="Only such events, e.g. patch or refused.")
@click.option("--by", "actor_filter", metavar="NAME", help="Only events of this actor.")
@click.option("--subject", metavar="NAME", help="Only events of this model, dimension or lineage.")
@list_options
@workspace_options
def log(
    workspace: "Workspace",
    actions: tuple[str, ...],
    actor_filter: str | None,
    subject: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """List the events of the ledger."""
    from governance.auditing import audit_log
    from governance.commands.rendering import emit_list, table

    events = audit_log(workspace, actions=actions, actor=actor_filter, subject=subject)
    emit_list(
        events,
        as_json,
        as_csv,
        lambda: table(
            "Audit ledger",
            ["event", "time", "actor", "action", "subject", "content", "hash"],
            [
                [
                    event.sequence,
                    event.created_at[:19].replace("T", " "),
                    event.actor,
                    event.action,
                    f"{event.subject_kind} {event.subject_name}",
                    _brief(event.payload),
                    event.hash[:10],
                ]
                for event in events
            ],
            right=["event"],
        ),
    )


@audit.command("verify")
@click.option("--weights", is_flag=True, help="Hash every file of models and working checkpoints, and every tensor.")
@click.option(
    "--lineage", metavar="NAME", help="Records and weights of this lineage only; the ledger is checked whole."
)
@json_option
@workspace_options
def verify(workspace: "Workspace", weights: bool, lineage: str | None, as_json: bool) -> None:
    """Check that ledger, exported heads, records, artifacts, claims and weights agree. Exits with 1 if not.

    \b
    Examples:
      neuronledger audit verify
      neuronledger audit verify --weights --lineage support-bot
    """
    from governance.auditing import verify as run
    from governance.commands.rendering import emit

    outcome = run(workspace, weights=weights, lineage=lineage)

    def people() -> None:
        for finding in outcome.findings:
            click.echo(f"FAILED {finding.check}: {finding.subject}: {finding.problem}", err=True)
        click.echo("Checked " + ", ".join(f"{count:,} {what}" for what, count in outcome.checked.items()) + ".")
        for skipped in outcome.not_checked:
            click.echo(f"Not checked: {skipped}.")
        if outcome.verified:
            click.echo("Everything checked agrees.")
        else:
            click.echo(f"{len(outcome.findings)} findings: the record does not stand.", err=True)

    content = {"verified": outcome.verified, "checked": outcome.checked, "not_checked": outcome.not_checked}
    emit({**content, "findings": outcome.findings}, as_json, people)
    if not outcome.verified:
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


def _brief(payload: dict[str, object]) -> str:
    """Return the parts of a payload that fit a line: digests shortened, nested parts left out."""
    parts = []
    for name, value in payload.items():
        if isinstance(value, (dict, list)) or value in ("", None):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{name} {text[:12] + '…' if len(text) == 64 and ' ' not in text else text}")
    return ", ".join(parts)
