"""Signing keys: files that only their owner may read, and errors that say what is wrong with any other."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from registry import keys
from registry.errors import KeyFileError, PassphraseError
from registry.keys import PrivateKey, PublicKey, create_key, public_path, read_private_key, read_public_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "signing.key"


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_created_key_is_read_back_and_signs(path: Path, passphrase: str | None) -> None:
    public = create_key(path, passphrase)
    private = read_private_key(path, passphrase)
    assert private.public == read_public_key(public_path(path)) == public
    signature = private.sign(b"message")
    assert public.has_signed(b"message", signature)
    assert not public.has_signed(b"massage", signature)
    assert not public.has_signed(b"message", "00" * 64)
    assert not PrivateKey.generate().public.has_signed(b"message", signature)


def test_the_private_key_is_for_its_owner_only_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        create_key(path, None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(public_path(path).stat().st_mode) == 0o644
    assert b"PRIVATE" not in public_path(path).read_bytes()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o666])
def test_a_private_key_that_is_open_to_others_is_not_used(path: Path, mode: int) -> None:
    create_key(path, None)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"open to others .mode {mode:04o}.*chmod 600"):
        read_private_key(path, None)
    path.chmod(0o400)
    read_private_key(path, None)


@pytest.mark.parametrize("there", ["signing.key", "signing.key.pub"])
def test_no_file_is_overwritten(path: Path, there: str) -> None:
    (path.parent / there).write_text("mine")
    with pytest.raises(KeyFileError, match=f"{there} exists"):
        create_key(path, None)
    assert [file.name for file in path.parent.iterdir()] == [there]
    assert (path.parent / there).read_text() == "mine"


def test_a_link_is_not_followed_to_a_new_file(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(KeyFileError, match="exists"):
        create_key(path, None)


def test_half_a_key_pair_is_not_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = keys.create_file

    def failing(file: Path, content: bytes, mode: int) -> None:
        if file.suffix == ".pub":
            raise OSError(28, "No space left on device")
        create(file, content, mode)

    monkeypatch.setattr(keys, "create_file", failing)
    with pytest.raises(KeyFileError, match="No space left"):
        create_key(path, None)
    assert list(path.parent.iterdir()) == []


def test_a_passphrase_is_needed_and_has_to_be_the_right_one(path: Path) -> None:
    create_key(path, "right")
    with pytest.raises(PassphraseError, match="is encrypted"):
        read_private_key(path, None)
    with pytest.raises(PassphraseError, match="does not open"):
        read_private_key(path, "wrong")


def test_a_passphrase_that_is_not_needed_does_not_disturb(path: Path) -> None:
    create_key(path, None)
    read_private_key(path, "any")


def _elliptic(private: bool) -> bytes:
    key = generate_private_key(SECP256R1())
    if private:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    "content",
    [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"\xff\x00", "elliptic"],
    ids=["empty", "text", "damaged", "binary", "another kind"],
)
def test_a_file_that_is_no_ed25519_key_is_named(path: Path, content: bytes | str) -> None:
    for private in (True, False):
        path.write_bytes(content if isinstance(content, bytes) else _elliptic(private))
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match="holds no"):
            (read_private_key(path, None) if private else read_public_key(path))


def test_a_missing_key_is_named(path: Path) -> None:
    for read in (lambda: read_private_key(path, None), lambda: read_public_key(path)):
        with pytest.raises(KeyFileError, match="No such file"):
            read()
    with pytest.raises(KeyFileError, match="Is a directory"):
        read_public_key(path.parent)


def test_a_private_key_does_not_show_itself() -> None:
    key = PrivateKey.generate()
    assert repr(key) == f"PrivateKey({key.public.fingerprint[:16]}…)"


def test_a_signature_that_is_pinned() -> None:
    """The first test vector of RFC 8032: signatures are plain Ed25519."""
    public = PublicKey("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert public.has_signed(b"", signature)
    assert public.fingerprint == "21fe31dfa154a261626bf854046fd2271b7bed4b6abe45aa58877ef47f9721b9"


def test_openssl_reads_the_key_files_where_it_is_installed(path: Path) -> None:
    create_key(path, "secret")
    command = ["openssl", "pkey", "-in", str(path), "-passin", "pass:secret", "-pubout"]
    try:
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return
    assert shown == public_path(path).read_text()
