"""`neuronledger keys`: make and show the keys that sign the ledger's heads."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from governance.commands.options import json_option

if TYPE_CHECKING:
    from governance.signing_keys import KeySummary


@click.group(short_help="Make and show keys that sign the ledger's heads.")
def keys() -> None:
    """Make and show the Ed25519 keys that sign the ledger's heads."""


@keys.command("create", short_help="Make a key pair.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--passphrase-prompt",
    "prompted",
    is_flag=True,
    help="Ask for a passphrase to encrypt the key with.  [default: $NEURONLEDGER_KEY_PASSPHRASE, else none]",
)
@click.option(
    "--keyring",
    is_flag=True,
    help="Keep the passphrase in the operating system's keyring; one is made up if none is given.",
)
@json_option
def create(file: Path, prompted: bool, keyring: bool, as_json: bool) -> None:
    """Make a key pair: the private key in FILE, for its owner only, the public key in FILE.pub.

    Keep the private key away from whoever can write the database; hand FILE.pub to whoever verifies.

    \b
    Examples:
      neuronledger keys create signing.key --passphrase-prompt
      neuronledger keys create signing.key --keyring
    """
    from governance.signing_keys import create_key

    passphrase = None
    if prompted:
        passphrase = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    made = create_key(file, passphrase=passphrase, keyring=keyring)
    _emit(made, as_json, f"Wrote {made.private_file}{'' if made.encrypted else ' (not encrypted)'}")


@keys.command("show", short_help="Print a public key and its fingerprint.")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Print the public key in FILE, a private or public key, and its fingerprint."""
    from governance.signing_keys import show_key

    _emit(show_key(file, ask_passphrase()), as_json, None)


def ask_passphrase() -> Callable[[str], str] | None:
    """What asks for a passphrase at a terminal; None where there is nobody to ask."""
    if not sys.stdin.isatty():
        return None
    return lambda question: str(click.prompt(question, hide_input=True, err=True))


def _emit(key: "KeySummary", as_json: bool, first: str | None) -> None:
    from governance.commands.rendering import emit

    def people() -> None:
        if first is not None:
            click.echo(first)
            click.echo(f"Wrote {key.public_file}")
        click.echo(f"Fingerprint {key.fingerprint}")
        click.echo(key.pem.rstrip())

    emit(key, as_json, people)
