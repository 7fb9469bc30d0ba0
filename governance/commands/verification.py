"""What `audit verify` and `audit verify-pack` share: the evidence they take, and how they tell what they found."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Problem(Protocol):
    """What was checked, which part it is about, and what is wrong."""

    @property
    def check(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def problem(self) -> str: ...


def evidence_options(key_help: str) -> Callable[[Command], Command]:
    """Add `--public-key` and `--heads`, and hand the command `public_keys` and `kept_heads`."""

    def add(command: Command) -> Command:
        with_heads = click.option(
            "--heads",
            "kept_heads",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Also check against this copy of the exported heads, or of some of them, that was kept elsewhere.",
        )(command)
        return click.option(
            "--public-key",
            "public_keys",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help=key_help,
        )(with_heads)

    return add


def tell_findings(findings: Iterable[Problem]) -> None:
    """Print what does not agree, a line each, to stderr."""
    for finding in findings:
        click.echo(f"FAILED {finding.check}: {finding.subject}: {finding.problem}", err=True)


def tell_checked(checked: Mapping[str, int]) -> None:
    """Print how many of each were checked."""
    click.echo("Checked " + ", ".join(f"{count:,} {what}" for what, count in checked.items()) + ".")


def tell_verdict(findings: Sequence[Problem], not_checked: Iterable[str], what: str) -> None:
    """Print what was not checked, and whether everything that was agrees; `what` does not stand if not."""
    for skipped in not_checked:
        click.echo(f"Not checked: {skipped}.")
    if not findings:
        click.echo("Everything checked agrees.")
        return
    counted = "1 finding" if len(findings) == 1 else f"{len(findings):,} findings"
    click.echo(f"{counted}: {what} does not stand.", err=True)
