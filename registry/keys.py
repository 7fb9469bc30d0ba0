"""Ed25519 keys that sign the ledger's heads, and the files that they lie in.

A private key is a PKCS#8 PEM file that only its owner may read, with or without a passphrase; the public key is a PEM
file (SubjectPublicKeyInfo) beside it. Both are what OpenSSL reads and writes.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from registry.errors import KeyFileError, PassphraseError
from registry.files import create_file, sync_directory

_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key: its 32 bytes in hexadecimal."""

    hex: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 bytes, in hexadecimal: what two people compare."""
        return hashlib.sha256(bytes.fromhex(self.hex)).hexdigest()

    @property
    def pem(self) -> str:
        """The key as a PEM file holds it."""
        return self._key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")

    def has_signed(self, message: bytes, signature: str) -> bool:
        """Whether the signature, in hexadecimal, was made of the message with the private key of this one."""
        try:
            self._key().verify(bytes.fromhex(signature), message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex))


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A private key in memory. Its text form does not show it."""

    _key: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"PrivateKey({self.public.fingerprint[:16]}…)"

    @classmethod
    def generate(cls) -> "PrivateKey":
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def public(self) -> PublicKey:
        """The public key of it."""
        return _public(self._key.public_key())

    def sign(self, message: bytes) -> str:
        """The signature of a message, in hexadecimal."""
        return self._key.sign(message).hex()

    def pem(self, passphrase: str | None) -> bytes:
        """The key as a PEM file holds it, encrypted if there is a passphrase."""
        encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def public_path(path: Path) -> Path:
    """Where the public key of a private key's file lies."""
    return path.with_name(f"{path.name}.pub")


def create_key(path: Path, passphrase: str | None) -> PublicKey:
    """Make a key: the private one at `path`, for its owner only, the public one beside it.

    Raises:
        KeyFileError: one of the files is there already, or cannot be written.
    """
    key = PrivateKey.generate()
    files = {path: (key.pem(passphrase), 0o600), public_path(path): (key.public.pem.encode(), 0o644)}
    for file in files:
        if file.exists() or file.is_symlink():
            raise KeyFileError(f"{file} exists", "Choose another name; a key that is in use must not be overwritten")
    made: list[Path] = []
    try:
        for file, (content, mode) in files.items():
            create_file(file, content, mode)
            made.append(file)
        sync_directory(path.parent)
    except OSError as error:
        for file in made:
            file.unlink()
        raise KeyFileError(
            f"{file} cannot be written: {error.strerror}", "Choose a directory that you may write"
        ) from error
    return key.public


def read_private_key(path: Path, passphrase: str | None) -> PrivateKey:
    """Read a private key.

    Args:
        path: a PKCS#8 PEM file.
        passphrase: of an encrypted one; not used for one that is not.

    Raises:
        KeyFileError: there is none, it is not an Ed25519 key, or others than its owner may read or write it.
        PassphraseError: it is encrypted, and the passphrase is missing or another.
    """
    content = _read(path, private=True)
    encrypted = b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in content
    if encrypted and not passphrase:
        raise PassphraseError(f"the private key {path} is encrypted", "Give its passphrase")
    try:
        key = load_pem_private_key(content, passphrase.encode() if encrypted and passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise PassphraseError(
                f"the passphrase does not open the private key {path}", "Give the right one"
            ) from error
        raise _not_a_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _not_a_key(path, "private")
    return PrivateKey(key)


def read_public_key(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        KeyFileError: there is none, or it is not an Ed25519 key.
    """
    try:
        key = load_pem_public_key(_read(path, private=False))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _not_a_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _not_a_key(path, "public")
    return _public(key)


def is_private_key_file(path: Path) -> bool:
    """Whether a file holds a private key by its first line.

    Raises:
        KeyFileError: it cannot be read.
    """
    return b"PRIVATE KEY-----" in _read(path, private=False)


def _read(path: Path, *, private: bool) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            mode = os.fstat(descriptor).st_mode
            if private and os.name != "nt" and mode & _OTHERS:
                raise KeyFileError(
                    f"the private key {path} is open to others (mode {mode & 0o777:04o})",
                    f"Run `chmod 600 {path}`; if somebody may have read it, make a new key",
                )
            return os.read(descriptor, _LONGEST_FILE)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KeyFileError(
            f"the key {path} cannot be read: {error.strerror}", "Give a file that `neuronledger keys create` made"
        ) from error


def _public(key: Ed25519PublicKey) -> PublicKey:
    return PublicKey(key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex())


def _not_a_key(path: Path, kind: str) -> KeyFileError:
    return KeyFileError(
        f"{path} holds no {kind} Ed25519 key in PEM form", "Give a file that `neuronledger keys create` made"
    )


_LONGEST_FILE = 1 << 16
