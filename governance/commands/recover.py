"""`neuronledger recover`: finish or undo what was interrupted."""

from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option, workspace_options

if TYPE_CHECKING:
    from governance.workspace import Workspace


@click.command(short_help="Undo or finish what was interrupted.")
@json_option
@workspace_options
def recover(workspace: "Workspace", as_json: bool) -> None:
    """Bring every interrupted lineage to the version before or after: an apply is undone, a revert is finished.

    Run it only when no other process is patching.
    """
    from governance.commands.rendering import emit_list
    from governance.patching import recover as recover_patches

    actions = recover_patches(workspace)

    def people() -> None:
        for action in actions:
            click.echo(f"Patch {action.patch} of {action.lineage} was {action.was} and is now {action.now}.")
        if not actions:
            click.echo("Nothing was interrupted.")

    emit_list(actions, as_json, as_csv=False, people=people)
