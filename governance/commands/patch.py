"""`neuronledger patch`: plan, apply, approve, list, show, revert, export and import."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from governance.commands.options import (
    json_option,
    list_options,
    placement_options,
    reason_option,
    workspace_options,
    writing_workspace_options,
)
from governance.commands.patch_exchange import export, import_
from governance.commands.settings import SettingsChoice, settings_options

if TYPE_CHECKING:
    from governance.gate_rules import RuleResult
    from governance.patch_records import PatchSummary
    from governance.planning import PlanSummary
    from governance.workspace import Workspace


@click.group(short_help="Plan, apply, approve, list, show, revert, export and import patches.")
def patch() -> None:
    """Plan, apply, approve, list, show and revert incremental patches, and take them to another registry."""


patch.add_command(export)
patch.add_command(import_)


@patch.command("plan", short_help="Show what a patch would change; write nothing.")
@click.argument("lineage")
@click.argument("dimension")
@settings_options
@click.option("--dry-run", is_flag=True, help="Accepted for symmetry: a plan never writes to the working checkpoint.")
@json_option
@writing_workspace_options
@placement_options
def plan(
    workspace: "Workspace",
    lineage: str,
    dimension: str,
    choice: "SettingsChoice",
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show what a patch of DIMENSION would change in LINEAGE, and refuse what applying it would refuse.

    Every new row is computed, so the plan is complete; only the identification is recorded.

    \b
    Example:
      neuronledger patch plan support-bot terrorism
    """
    del dry_run
    _plan_only(workspace, lineage, dimension, choice, as_json)


@patch.command("apply", short_help="Identify if needed, plan, judge, write, verify, protect.")
@click.argument("lineage")
@click.argument("dimension", required=False)
@settings_options
@click.option(
    "--dry-run", is_flag=True, help="Plan and judge only: show what would change and refuse what would be refused."
)
@click.option(
    "--planned", type=int, metavar="NUMBER", help="Write this planned patch, which was approved, instead of a new one."
)
@reason_option
@json_option
@writing_workspace_options
@placement_options
def apply(
    workspace: "Workspace",
    lineage: str,
    dimension: str | None,
    choice: "SettingsChoice",
    dry_run: bool,
    planned: int | None,
    reason: str,
    as_json: bool,
) -> None:
    """Identify if needed, plan, write, verify and protect: one patch of DIMENSION on the head of LINEAGE.

    Where a policy is in force the patch is judged first, in memory. One that its gates refuse is recorded as rejected;
    one that needs approvals is recorded as planned, to be written with --planned once others approved it. Both exit
    with 1: nothing was written.

    \b
    Examples:
      neuronledger patch apply support-bot terrorism --reason "request 4711"
      neuronledger patch apply support-bot terrorism --preset fgsn-paper --dry-run
      neuronledger patch apply support-bot terrorism --method nlsr --set beta=0.3
      neuronledger patch apply support-bot --planned 3
    """
    if planned is not None:
        if dimension is not None or dry_run:
            raise click.UsageError("--planned takes no DIMENSION and no --dry-run: the patch was planned and judged")
        from governance.approvals import apply_planned

        emit_patch(apply_planned(workspace, lineage, planned), as_json)
        return
    if dimension is None:
        raise click.UsageError("name the DIMENSION, or a planned patch with --planned NUMBER")
    if dry_run:
        _plan_only(workspace, lineage, dimension, choice, as_json)
        return
    from governance.identification import run_identification
    from governance.patching import apply_patch
    from governance.planning import plan_patch

    with workspace.attempt("patch.apply", "lineage", lineage):
        settings = choice.settings()
    found = run_identification(workspace, lineage, dimension, settings, choice.preset, reuse=True)
    summary = apply_patch(workspace, plan_patch(workspace, lineage, found.identification), reason)
    emit_patch(summary, as_json, lambda: _show_notes(found.unreached, found.warnings))


@patch.command("approve", short_help="Approve or reject a planned patch.")
@click.argument("lineage")
@click.argument("number", type=int)
@click.option("--reject", is_flag=True, help="Reject the patch for good instead; it has to be planned again.")
@reason_option
@json_option
@writing_workspace_options
def approve(workspace: "Workspace", lineage: str, number: int, reject: bool, reason: str, as_json: bool) -> None:
    """Approve planned patch NUMBER of LINEAGE, or reject it; its planner cannot approve it.

    \b
    Examples:
      neuronledger patch show support-bot 3
      neuronledger patch approve support-bot 3 --reason "figures checked"
      neuronledger patch approve support-bot 3 --reject --reason "loses too much accuracy"
    """
    from governance.approvals import approve_patch
    from governance.commands.rendering import emit

    summary = approve_patch(workspace, lineage, number, refuse=reject, reason=reason)
    emit(summary, as_json, lambda: show_patch(summary))


@patch.command("list")
@click.argument("lineage")
@list_options
@workspace_options
def list_(workspace: "Workspace", lineage: str, as_json: bool, as_csv: bool) -> None:
    """List the patches of LINEAGE."""
    from governance.commands.rendering import emit_list, percent, table
    from governance.patch_records import list_patches

    patches = list_patches(workspace, lineage)
    imported = any(p.origin for p in patches)
    emit_list(
        patches,
        as_json,
        as_csv,
        lambda: table(
            f"Patches of {lineage}",
            [
                *("patch", "dimension", "state", "selected", "already protected", "modified", "share", "actor"),
                *(["from"] if imported else []),
                "reason",
            ],
            [
                [
                    p.patch,
                    p.dimension,
                    p.state,
                    f"{p.neurons_selected:,}",
                    f"{p.neurons_already_protected:,}",
                    f"{p.neurons_modified:,}",
                    percent(p.modified_share),
                    p.actor,
                    *([f"{p.origin.lineage} {p.origin.patch}" if p.origin else ""] if imported else []),
                    p.reason,
                ]
                for p in patches
            ],
            right=["selected", "already protected", "modified", "share"],
        ),
    )


@patch.command("show")
@click.argument("lineage")
@click.argument("number", type=int)
@json_option
@workspace_options
def show(workspace: "Workspace", lineage: str, number: int, as_json: bool) -> None:
    """Show patch NUMBER of LINEAGE and what it changed in every module."""
    from governance.commands.rendering import emit, table
    from governance.patch_records import show_patch as find_patch

    summary, changes = find_patch(workspace, lineage, number)

    def people() -> None:
        show_patch(summary)
        table(
            "Modules",
            ["module", "rows", "unchanged", "parameters", "norm before", "norm after", "change"],
            [
                [
                    change.module,
                    change.rows,
                    change.rows_unchanged,
                    f"{change.parameters:,}",
                    f"{change.norm_before or 0:.4g}",
                    f"{change.norm_after or 0:.4g}",
                    f"{change.change_norm or 0:.4g}",
                ]
                for change in changes
            ],
            right=["rows", "unchanged", "parameters", "norm before", "norm after", "change"],
        )

    emit({"patch": summary, "modules": changes} if as_json else summary, as_json, people)


@patch.command("revert", short_help="Take a patch back exactly.")
@click.argument("lineage")
@click.argument("number", type=int, required=False)
@reason_option
@json_option
@writing_workspace_options
def revert(workspace: "Workspace", lineage: str, number: int | None, reason: str, as_json: bool) -> None:
    """Take a patch of LINEAGE back exactly and release what it protects: the head, or patch NUMBER.

    A patch whose rows a later one wrote again is refused until that one is reverted.

    \b
    Examples:
      neuronledger patch revert support-bot
      neuronledger patch revert support-bot 2 --reason "withdrawn"
    """
    from governance.commands.rendering import emit
    from governance.patching import revert_patch

    summary = revert_patch(workspace, lineage, number, reason)
    emit(
        summary,
        as_json,
        lambda: click.echo(
            f"Reverted patch {summary.patch} of {summary.lineage} ({summary.dimension}): {summary.rows_modified:,} "
            f"{'neurons' if summary.neurons_modified else 'rows'} have their former bytes again, and what it protected "
            f"is free."
        ),
    )


def _plan_only(workspace: "Workspace", lineage: str, dimension: str, choice: "SettingsChoice", as_json: bool) -> None:
    from governance.commands.rendering import emit
    from governance.dry_runs import dry_run
    from governance.identification import run_identification
    from governance.planning import plan_patch

    with workspace.attempt("patch.plan", "lineage", lineage):
        settings = choice.settings()
    found = run_identification(workspace, lineage, dimension, settings, choice.preset, reuse=True)
    summary = dry_run(workspace, plan_patch(workspace, lineage, found.identification))
    emit(summary, as_json, lambda: _show_plan(summary))
    if summary.refused:
        raise SystemExit(1)


def emit_patch(summary: "PatchSummary", as_json: bool, notes: Callable[[], None] = lambda: None) -> None:
    """Say what became of a patch that was to be written; exit with 1 if it was not."""
    from governance.commands.rendering import emit

    def people() -> None:
        show_patch(summary)
        notes()

    emit(summary, as_json, people)
    if summary.state != "applied":
        raise SystemExit(1)


def _show_plan(plan: "PlanSummary") -> None:
    from governance.commands.rendering import percent, size, table

    directed = plan.directions > 0
    columns = ["selected", "protected", *(["directions"] if directed else []), "to modify", "unchanged"]
    table(
        f"Plan: {plan.dimension} in {plan.lineage}, on {'the subject' if plan.head is None else f'patch {plan.head}'}",
        ["module", *columns, "parameters", "bytes"],
        [
            [
                module.module,
                module.selected,
                module.protected,
                *([module.directions] if directed else []),
                module.rows,
                module.rows_unchanged,
                f"{module.parameters:,}",
                size(module.bytes),
            ]
            for module in plan.modules
            if module.selected
        ],
        right=[*columns, "parameters", "bytes"],
    )
    modules = sum(module.rows > 0 for module in plan.modules)
    click.echo(
        f"{plan.directions:,} input directions to protect in {modules} modules, {plan.rows_modified:,} rows to write, "
        f"{plan.neurons_protected:,} left out as protected neurons: "
        if directed
        else f"{plan.neurons_selected:,} neurons selected, {plan.neurons_protected:,} already protected, "
        f"{plan.neurons_modified:,} to modify in {modules} modules: ",
        nl=False,
    )
    click.echo(
        f"{plan.parameters_modified:,} parameters ({percent(plan.modified_share)} of the model, "
        f"{percent(plan.modified_linear_share)} of its linear parameters), {size(plan.bytes)}."
    )
    for dimension, count in plan.protected_by.items():
        click.echo(f"{count:,} of the selected neurons are protected by {dimension} and stay as they are.")
    if plan.rows_unchanged:
        click.echo(f"{plan.rows_unchanged:,} rows would keep their bytes after rounding to the file's dtype.")
    _show_notes(plan.unreached, plan.warnings)
    show_gates(plan.policy, plan.gates, refused=plan.refused, approvals_needed=plan.approvals_needed)


def show_gates(policy: str | None, gates: "Sequence[RuleResult]", *, refused: bool, approvals_needed: int) -> None:
    """Say what a dry run was judged by, and that nothing was written."""
    show_rules(policy, gates)
    if approvals_needed:
        click.echo(f"It would wait for {approvals_needed} approvals by others.")
    click.echo(f"{'The policy refuses the patch' if refused else 'Nothing was refused'}; nothing was written.")


def show_rules(policy: str | None, gates: "Sequence[RuleResult]") -> None:
    """Print every rule of a policy's gates with what was measured."""
    from governance.commands.rendering import table

    if not gates:
        return
    table(
        f"Gates of policy {policy}",
        ["rule", "of", "limit", "measured", "", "figures"],
        [
            [
                rule.rule,
                rule.subject,
                f"{rule.limit:.4g}",
                f"{rule.measured:.4g}",
                "passed" if rule.passed else "FAILED",
                rule.explanation,
            ]
            for rule in gates
        ],
        right=["limit", "measured"],
    )


def _show_notes(unreached: tuple[str, ...], warnings: tuple[str, ...]) -> None:
    if unreached:
        click.echo(f"{len(unreached):,} modules in scope cannot be changed, first {unreached[0]}.")
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


def show_patch(summary: "PatchSummary") -> None:
    """Say what became of a patch, in sentences."""
    from governance.commands.rendering import percent

    claimed = (
        f"{summary.neurons_selected:,} neurons selected, {summary.neurons_already_protected:,} already protected, "
        f"{summary.neurons_modified:,} modified"
    )
    if summary.settings.get("protect") == "directions":
        claimed = (
            f"{summary.directions:,} input directions protected, "
            f"{summary.neurons_already_protected:,} rows left out as protected neurons, "
            f"{summary.rows_modified:,} rows written"
        )
    click.echo(
        f"Patch {summary.patch} of {summary.lineage} ({summary.dimension}) is {summary.state}: "
        f"{claimed} in {summary.modules} modules ({percent(summary.modified_share)} of the "
        f"model's parameters, {percent(summary.modified_linear_share)} of its linear parameters)."
    )
    if summary.rows_unchanged:
        click.echo(f"{summary.rows_unchanged:,} of these rows kept their bytes after rounding to the file's dtype.")
    if summary.origin:
        origin = summary.origin
        click.echo(
            f"It came from patch {origin.patch} of {origin.lineage} ({origin.dimension}), applied there by "
            f"{origin.actor} at {origin.applied_at} and exported by {origin.exported_by} at {origin.exported_at} "
            f"(neuronledger {origin.neuronledger}, event {origin.ledger_events} of that ledger, "
            f"{origin.ledger_hash[:16]}…)."
        )
    show_rules(summary.policy, summary.gates)
    for approval in summary.approvals:
        why = f": {approval.reason}" if approval.reason else ""
        click.echo(f"{approval.decision.capitalize()} by {approval.actor}{why}.")
    if summary.state == "planned":
        approved = sum(each.decision == "approved" for each in summary.approvals)
        write = f"neuronledger patch apply {summary.lineage} --planned {summary.patch}"
        waits = (
            f"It is approved: {write} writes it."
            if approved >= summary.approvals_needed
            else f"It waits for approval: {approved} of {summary.approvals_needed}; others than {summary.actor} run "
            f"neuronledger patch approve {summary.lineage} {summary.patch}, then {write}."
        )
        click.echo(f"Nothing was written. {waits}")
    elif summary.failure:
        click.echo(f"It failed: {summary.failure}")
    if summary.digest_after:
        click.echo(f"Weights {summary.digest_before[:16]}… → {summary.digest_after[:16]}…")
