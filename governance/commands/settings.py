"""Options that choose settings: a file and single values, and for the methods of `identify` and `patch` a preset."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from algorithms.editors import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class GivenSettings:
    """The settings file and the single values that were named on the command line."""

    file: Path | None
    assignments: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Read them; a single value replaces that of the file.

        Raises:
            InputError: the file or an assignment cannot be read.
        """
        return (_from_file(self.file) if self.file else {}) | dict(_assignment(text) for text in self.assignments)


@dataclass(frozen=True)
class SettingsChoice:
    """What was said on the command line of a method and its settings."""

    method: str
    preset: str
    reference: str | None
    given: GivenSettings

    def settings(self) -> "Settings":
        """Combine the method's preset, the file and single values.

        Raises:
            InputError: the file or an assignment cannot be read.
            SettingsError: a setting is unknown to the method or out of range.
        """
        from algorithms.methods import method_of

        named = {} if self.reference is None else {"reference": self.reference}
        return method_of(self.method).choose(self.preset, self.given.values() | named)


def given_settings_options(command: Command) -> Command:
    """Add `--settings` and `--set`, and hand the command the `given` settings."""

    @click.option(
        "--settings",
        "settings_file",
        type=click.Path(path_type=Path),
        metavar="FILE.toml",
        help="Settings that replace the defaults, or those of the preset.",
    )
    @click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="One setting, such as seed=1. Repeatable; comes last.",
    )
    @wraps(command)
    def with_given(*args: Any, settings_file: Path | None, assignments: tuple[str, ...], **kwargs: Any) -> Any:
        return command(*args, given=GivenSettings(settings_file, assignments), **kwargs)

    return with_given  # type: ignore[return-value]


def settings_options(command: Command) -> Command:
    """Add the options of a method and its settings, and hand the command a `choice` of them."""

    @wraps(command)
    def with_choice(
        *args: Any, method: str, preset: str, reference: str | None, given: GivenSettings, **kwargs: Any
    ) -> Any:
        return command(*args, choice=SettingsChoice(method, preset, reference, given), **kwargs)

    found: Any = given_settings_options(with_choice)
    for option in reversed(
        [
            click.option(
                "--method",
                type=click.Choice(["fgsn", "nlsr"]),
                default="fgsn",
                show_default=True,
                help="fgsn: project the neurons that carry the loss of safety; nlsr: transplant safe neurons from a "
                "super-aligned reference.",
            ),
            click.option(
                "--preset",
                default="default",
                show_default=True,
                metavar="NAME",
                help="Named settings: default, random-control; of fgsn also sparse, strong and fgsn-paper; of nlsr "
                "also nlsr-paper and nlsr-published-code.",
            ),
            click.option(
                "--reference",
                metavar="NAME",
                help="For nlsr: the registered reference model. Left out, the aligned model is extrapolated by beta.",
            ),
        ]
    ):
        found = option(found)
    return found  # type: ignore[no-any-return]


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
