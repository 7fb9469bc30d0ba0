"""Options that choose a method's settings: preset, file, single values. Shared by `identify` and `patch`."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from algorithms.settings import FgsnSettings

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_options(command: Command) -> Command:
    """Add `--method`, `--preset`, `--settings` and `--set`."""
    for option in reversed(
        [
            click.option(
                "--method", type=click.Choice(["fgsn"]), default="fgsn", show_default=True, help="The method."
            ),
            click.option(
                "--preset",
                default="default",
                show_default=True,
                metavar="NAME",
                help="Named settings: default, fgsn-paper (as published), random-control.",
            ),
            click.option(
                "--settings",
                "settings_file",
                type=click.Path(path_type=Path),
                metavar="FILE.toml",
                help="Settings that replace those of the preset.",
            ),
            click.option(
                "--set",
                "assignments",
                multiple=True,
                metavar="KEY=VALUE",
                help="One setting, such as budget=0.05. Repeatable; comes last.",
            ),
        ]
    ):
        command = option(command)
    return command


def chosen_settings(preset: str, file: Path | None, assignments: tuple[str, ...]) -> "FgsnSettings":
    """Combine preset, file and single values.

    Raises:
        InputError: the file or an assignment cannot be read.
        SettingsError: a setting is unknown or out of range.
    """
    from algorithms.settings import fgsn_settings

    values = _from_file(file) if file else {}
    for text in assignments:
        name, value = _assignment(text)
        values[name] = value
    return fgsn_settings(preset, values)


def _from_file(file: Path) -> dict[str, Any]:
    from governance.errors import InputError

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no settings file {file}", "check its path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML ({error})", "write one `key = value` a line") from error


def _assignment(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value is TOML where it can be, else text, so lists and numbers come naturally."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
