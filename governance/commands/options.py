"""Options that commands share, defined once: the registry, the actor, the form of the output."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from governance.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])


def workspace_options(command: Command) -> Command:
    """Add `--database` and `--actor`, and hand the command an open `workspace`."""

    @click.option(
        "--database",
        metavar="URL",
        envvar="NEURONLEDGER_DATABASE",
        help="Registry: sqlite:///FILE or postgresql://…  [default: sqlite:///.neuronledger/registry.db]",
    )
    @click.option(
        "--actor",
        metavar="NAME",
        envvar="NEURONLEDGER_ACTOR",
        help="Who acts, for the record.  [default: the operating system's user]",
    )
    @wraps(command)
    def with_workspace(*args: Any, database: str | None, actor: str | None, **kwargs: Any) -> Any:
        return command(*args, workspace=open_here(database, actor), **kwargs)

    return with_workspace  # type: ignore[return-value]


def open_here(database: str | None, actor: str | None) -> "Workspace":
    """Open the registry that the options or the environment name, with a progress bar on a terminal."""
    from governance.commands.progress import terminal_progress
    from governance.workspace import default_actor, default_database, open_workspace

    return open_workspace(database or default_database(), actor or default_actor(), terminal_progress())


def json_option(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def list_options(command: Command) -> Command:
    """Add `--json` and `--csv`."""
    command = click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")(command)
    return json_option(command)


def reason_option(command: Command) -> Command:
    """Add `--reason`."""
    return click.option("--reason", default="", metavar="TEXT", help="Why, for the record.")(command)
