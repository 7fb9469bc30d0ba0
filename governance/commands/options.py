"""Options that commands share, defined once: the registry, the actor, the form of the output."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from governance.placement import Precision
    from governance.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])


def workspace_options(command: Command) -> Command:
    """Add `--database` and `--actor`, and hand the command an open `workspace` to read."""
    return _with_workspace(command, open_here)


def writing_workspace_options(command: Command) -> Command:
    """As `workspace_options`, for a command that writes: what was interrupted is recovered first."""
    return _with_workspace(command, _open_recovered)


def placement_options(command: Command) -> Command:
    """Add `--device-map` and `--dtype` to a command below its workspace: models are loaded like that there."""

    @click.option(
        "--device-map",
        metavar="WHERE",
        envvar="NEURONLEDGER_DEVICE_MAP",
        help="Where models run: auto (over all GPUs, then the CPU), a device such as cuda:0, or a file .json of module "
        "name to device. Needs accelerate.  [default: the CPU]",
    )
    @click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        envvar="NEURONLEDGER_DTYPE",
        help="Number format that models run in.",
    )
    @wraps(command)
    def with_placement(
        *args: Any, workspace: "Workspace", device_map: str | None, dtype: "Precision", **kwargs: Any
    ) -> Any:
        from governance.placement import read_placement

        placed = replace(workspace, placement=read_placement(device_map, dtype))
        return command(*args, workspace=placed, **kwargs)

    return with_placement  # type: ignore[return-value]


def _with_workspace(command: Command, opened: "Callable[[str | None, str | None], Workspace]") -> Command:
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
        return command(*args, workspace=opened(database, actor), **kwargs)

    return with_workspace  # type: ignore[return-value]


def _open_recovered(database: str | None, actor: str | None) -> "Workspace":
    """Open the registry and recover what was interrupted; what is at work, here or elsewhere, is left to itself."""
    from registry.errors import LockedError
    from registry.queries import unfinished_patches

    workspace = open_here(database, actor)
    with workspace.registry.read() as session:
        interrupted = bool(unfinished_patches(session))
    if interrupted or workspace.store.leftovers():
        from governance.recovery import recover_what_can_be

        recovery = recover_what_can_be(workspace)
        for action in recovery.actions:
            click.echo(action.sentence, err=True)
        for failure in recovery.failures:
            if not isinstance(failure, LockedError):
                click.echo(f"Could not recover: {failure}", err=True)
    return workspace


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


def pairs(texts: tuple[str, ...], option: str, form: str, *, empty: bool = False) -> list[tuple[str, str]]:
    """Split what a repeatable option was given at its first `=`.

    Args:
        texts: what was given.
        option: its name.
        form: what is expected, such as NAME=FILE.
        empty: whether nothing may stand after the `=`.

    Raises:
        click.BadParameter: one of them is not of that form.
    """
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not (value or empty):
            raise click.BadParameter(f"{text!r} is not {form}", param_hint=option)
        found.append((name, value))
    return found


def reason_option(command: Command) -> Command:
    """Add `--reason`."""
    return click.option("--reason", default="", metavar="TEXT", help="Why, for the record.")(command)
