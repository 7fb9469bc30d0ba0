"""`neuronledger patch export` and `import`: a patch taken to another registry."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import (
    json_option,
    placement_options,
    reason_option,
    workspace_options,
    writing_workspace_options,
)

if TYPE_CHECKING:
    from governance.adapter_export import AdapterExportSummary
    from governance.patch_export import ExportSummary
    from governance.patch_import import ImportSummary
    from governance.workspace import Workspace


@click.command("export", short_help="Write a patch to a file.")
@click.argument("lineage")
@click.argument("number", type=int)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--as-adapter", is_flag=True, help="Write a PEFT LoRA adapter directory of what the patch changes.")
@click.option("--force", is_flag=True, help="Replace a file, or an adapter, that is there already.")
@json_option
@workspace_options
def export(
    workspace: "Workspace", lineage: str, number: int, path: Path, as_adapter: bool, force: bool, as_json: bool
) -> None:
    """Write patch NUMBER of LINEAGE to the file PATH, with its provenance, for another registry to import.

    The file holds the changed rows as they were and as they became, digests, settings and names; it holds no prompt.
    With --as-adapter, PATH is a directory instead: a LoRA adapter on the same base that makes this patch's change.

    \b
    Examples:
      neuronledger patch export support-bot 2 terrorism.patch.safetensors
      neuronledger patch export support-bot 2 ./terrorism-lora --as-adapter
    """
    from governance.commands.rendering import emit

    if as_adapter:
        from governance.adapter_export import export_adapter

        adapter = export_adapter(workspace, lineage, number, path, force=force)
        emit(adapter, as_json, lambda: _show_adapter(adapter))
        return
    from governance.patch_export import export_patch

    summary = export_patch(workspace, lineage, number, path, force=force)
    emit(summary, as_json, lambda: _show_export(summary))


@click.command("import", short_help="Apply an exported patch.")
@click.argument("lineage")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dimension", metavar="NAME", help="Dimension here that the patch is for.  [default: of the same name]")
@click.option("--sha256", metavar="DIGEST", help="What the SHA-256 of FILE has to be, as the export printed it.")
@click.option("--dry-run", is_flag=True, help="Check only: show what would change and refuse what would be refused.")
@reason_option
@json_option
@writing_workspace_options
@placement_options
def import_(
    workspace: "Workspace",
    lineage: str,
    file: Path,
    dimension: str | None,
    sha256: str | None,
    dry_run: bool,
    reason: str,
    as_json: bool,
) -> None:
    """Apply an exported patch to LINEAGE, whose subject has the very weights that the patch was made for.

    It is judged, written, verified and protected as any patch; its record says where it came from.

    \b
    Examples:
      neuronledger patch import support-bot terrorism.patch.safetensors --dry-run
      neuronledger patch import support-bot terrorism.patch.safetensors --dimension violence --reason "from site A"
    """
    from governance.commands.patch import emit_patch
    from governance.commands.rendering import emit
    from governance.patch_import import dry_run_import, import_patch

    if dry_run:
        checked = dry_run_import(workspace, lineage, file, dimension=dimension, sha256=sha256)
        emit(checked, as_json, lambda: _show_import(checked))
        if checked.refused:
            raise SystemExit(1)
        return
    emit_patch(import_patch(workspace, lineage, file, dimension=dimension, sha256=sha256, reason=reason), as_json)


def _show_export(summary: "ExportSummary") -> None:
    from governance.commands.rendering import size

    click.echo(
        f"Exported patch {summary.patch} of {summary.lineage} ({summary.dimension}) to {summary.path}: "
        f"{summary.rows:,} rows of {summary.modules} modules, {size(summary.bytes)}."
    )
    click.echo(f"SHA-256 {summary.sha256}")


def _show_adapter(summary: "AdapterExportSummary") -> None:
    from governance.commands.rendering import size

    click.echo(
        f"Exported patch {summary.patch} of {summary.lineage} ({summary.dimension}) as an adapter to {summary.path}: "
        f"{summary.rows:,} rows of {summary.modules} modules, largest rank {summary.largest_rank:,}, "
        f"{size(summary.bytes)}."
    )
    click.echo(f"Its base is {summary.base}. SHA-256 of its weights {summary.sha256}")


def _show_import(summary: "ImportSummary") -> None:
    from governance.commands.patch import show_gates
    from governance.commands.rendering import percent, size

    if summary.origin:
        click.echo(f"Patch {summary.origin.patch} of {summary.origin.lineage} ({summary.origin.dimension}) fits.")
    click.echo(
        f"{summary.neurons_modified:,} neurons to modify in {summary.modules} modules of {summary.lineage} for "
        f"{summary.dimension}: {summary.parameters_modified:,} parameters ({percent(summary.modified_share)} of the "
        f"model, {percent(summary.modified_linear_share)} of its linear parameters), {size(summary.bytes)}."
    )
    if summary.rows_unchanged:
        click.echo(f"{summary.rows_unchanged:,} of these rows keep their bytes.")
    show_gates(summary.policy, summary.gates, refused=summary.refused, approvals_needed=summary.approvals_needed)
