"""`neuronledger recover`: finish or undo what was interrupted."""

from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.command(short_help="Undo or finish what was interrupted.")
@click.option(
    "--take-over",
    is_flag=True,
    help="Also recover what a process of another host or container was doing. Only when nothing runs there any more.",
)
@json_option
@workspace_options
def recover(workspace: "Workspace", take_over: bool, as_json: bool) -> None:
    """Bring every interrupted lineage to the version before or after: an apply is undone, a revert is finished.

    Every command that writes does this first. A lineage that a living process is writing to is left alone and named;
    whether a process of another host or container lives cannot be told from here. The last line of the exported heads
    is written if it is missing.
    """
    from governance.commands.rendering import emit_list
    from governance.recovery import recover_what_can_be

    recovery = recover_what_can_be(workspace, foreign=take_over)
    if recovery.heads_completed:
        click.echo("Completed the exported heads: the ledger's last head was missing.", err=True)
    if recovery.failures:
        raise recovery.failures[0]

    def people() -> None:
        for action in recovery.actions:
            click.echo(action.sentence)
        if not recovery.actions and not recovery.heads_completed:
            click.echo("Nothing was interrupted.")

    emit_list(recovery.actions, as_json, as_csv=False, people=people)
