"""Where the signing key and its passphrase come from: the environment, the keyring, or whoever sits at the terminal."""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from registry import keys
from registry.database import Signer
from registry.errors import KeyFileError, PassphraseError
from registry.heads import Sign
from registry.keys import PrivateKey, PublicKey
from registry.signatures import sign_head

SIGNING_KEY = "NEURONLEDGER_SIGNING_KEY"
PASSPHRASE = "NEURONLEDGER_KEY_PASSPHRASE"  # noqa: S105  the name of a variable
_SERVICE = "neuronledger"

Ask = Callable[[str], str]
"""Asks a person for a passphrase."""


@dataclass(frozen=True)
class KeySummary:
    """A key as it is shown: its public half, the fingerprint to compare, and the files."""

    fingerprint: str
    public_key: str
    pem: str
    private_file: Path | None
    public_file: Path | None
    encrypted: bool | None = None


def environment_signer() -> Signer | None:
    """What signs every head if `$NEURONLEDGER_SIGNING_KEY` names a key; it is read when the first head needs it."""
    path = os.environ.get(SIGNING_KEY)
    return cache(partial(_signer, Path(path))) if path else None


def create_key(path: Path, *, passphrase: str | None = None, keyring: bool = False) -> KeySummary:
    """Make a signing key at `path` and its public key beside it.

    Args:
        path: a file that is not there yet.
        passphrase: encrypts it; `$NEURONLEDGER_KEY_PASSPHRASE` if left out.
        keyring: keep the passphrase in the operating system's keyring; one is made up if none is given.

    Raises:
        KeyFileError: a file is there already or cannot be written, or the keyring cannot be used.
    """
    passphrase = passphrase or os.environ.get(PASSPHRASE) or (secrets.token_urlsafe(32) if keyring else None)
    if keyring:
        _require_keyring()
    public = keys.create_key(path, passphrase)
    if keyring and passphrase:
        try:
            _keep(path, passphrase)
        except KeyFileError:
            path.unlink()
            keys.public_path(path).unlink()
            raise
    return _summary(public, path, keys.public_path(path), encrypted=passphrase is not None)


def show_key(path: Path, ask: Ask | None = None) -> KeySummary:
    """Read the public key of a private or public key file.

    Raises:
        KeyFileError: it holds no key, or a private key that others may read.
        PassphraseError: it is encrypted and its passphrase is not known.
    """
    if keys.is_private_key_file(path):
        return _summary(open_private_key(path, ask).public, path, None)
    return _summary(keys.read_public_key(path), None, path)


def open_private_key(path: Path, ask: Ask | None = None) -> PrivateKey:
    """Read a private key, with the passphrase from the environment, from the keyring or from a person, in this order.

    Raises:
        KeyFileError: it holds no key, or others may read it.
        PassphraseError: it is encrypted and its passphrase is not known.
    """
    try:
        return keys.read_private_key(path, os.environ.get(PASSPHRASE))
    except PassphraseError:
        passphrase = None if os.environ.get(PASSPHRASE) else _kept(path)
        if passphrase is None and ask is not None:
            passphrase = ask(f"Passphrase of {path}")
        if passphrase is None:
            raise
        return keys.read_private_key(path, passphrase)


def _signer(path: Path) -> Sign:
    return partial(sign_head, key=open_private_key(path))


def _summary(
    public: PublicKey, private_file: Path | None, public_file: Path | None, *, encrypted: bool | None = None
) -> KeySummary:
    return KeySummary(public.fingerprint, public.hex, public.pem, private_file, public_file, encrypted)


def _require_keyring() -> None:
    try:
        import keyring  # noqa: F401
    except ImportError as error:
        raise KeyFileError(
            "keeping a passphrase in the keyring needs the package keyring",
            "Run `pip install 'neuronledger[keyring]'`, or leave --keyring out",
        ) from error


def _keep(path: Path, passphrase: str) -> None:
    import keyring
    from keyring.errors import KeyringError

    try:
        keyring.set_password(_SERVICE, str(path.resolve()), passphrase)
    except KeyringError as error:
        raise KeyFileError(
            f"the keyring does not take the passphrase: {error}", "Set up a keyring, or leave --keyring out"
        ) from error


def _kept(path: Path) -> str | None:
    """The passphrase that the keyring keeps for a key file, if there is a keyring and it does."""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return None
    try:
        return keyring.get_password(_SERVICE, str(path.resolve()))
    except KeyringError:
        return None
