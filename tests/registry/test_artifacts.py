"""A digest names its whole content, or nothing; damage and absence are told."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import artifacts, files
from registry.artifacts import ArtifactStore
from registry.errors import ArtifactError, ArtifactStoreError
from registry.processes import Owner, this_process


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def spoil(path: Path, content: bytes) -> None:
    """Overwrite a read-only file."""
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("shared") / "artifacts")


@given(content=st.binary(max_size=200))
def test_what_is_put_is_read(shared_store: ArtifactStore, content: bytes) -> None:
    digest = shared_store.put_bytes(content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert shared_store.read_bytes(digest) == content
    assert shared_store.verify(digest).read_bytes() == content


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o027, 0o440), (0o077, 0o400)])
def test_a_written_file_is_kept_for_whom_the_umask_lets_read(store: ArtifactStore, umask: int, mode: int) -> None:
    """Another user of the registry has to read what a patch of this one replaced, and nobody has to write it."""
    with store.writer() as path:
        path.write_bytes(b"rows")
        before = os.umask(umask)
        try:
            digest = store.commit(path)
        finally:
            assert os.umask(before) == umask
    assert stat.S_IMODE(store.path(digest).stat().st_mode) == mode
    assert store.list() == (digest,)
    assert store.leftovers() == ()
    assert store.contains(digest)


def test_what_is_being_written_is_its_writer_s_alone(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []

    def seal(_: ArtifactStore, temporary: Path) -> str:
        modes.append(stat.S_IMODE(temporary.stat().st_mode))
        raise ZeroDivisionError

    monkeypatch.setattr(ArtifactStore, "seal", seal)
    with pytest.raises(ZeroDivisionError):
        store.put_bytes(b"rows")
    assert modes == [0o600]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_an_artifact_that_another_user_may_not_read_is_no_damage(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    digest = store.put_bytes(b"rows")

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, call, refuse)
    for read in (store.verify, store.read_bytes):
        with pytest.raises(
            ArtifactError, match=rf"{digest} cannot be read.*read permission.*chmod .* {store.directory}"
        ):
            read(digest)


def test_an_artifact_that_the_disk_does_not_give_is_to_be_restored(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put_bytes(b"rows")

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ArtifactError, match=r"Input/output error\. Restore"):
        store.verify(digest)


def test_a_writer_may_replace_its_file(store: ArtifactStore) -> None:
    """Some libraries write a file of their own and rename it over the path they were given."""
    with store.writer() as path:
        other = path.with_suffix(".other")
        other.write_bytes(b"rows")
        other.replace(path)
        digest = store.commit(path)
    assert store.read_bytes(digest) == b"rows"


def test_the_same_content_is_kept_once(store: ArtifactStore) -> None:
    assert store.put_bytes(b"rows") == store.put_bytes(b"rows")
    assert len(store.list()) == 1


def test_every_directory_of_an_artifact_is_flushed_in_the_one_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is there already: another process may have made it just now."""
    flushed: list[Path] = []
    for module in (files, artifacts):
        monkeypatch.setattr(module, "sync_directory", flushed.append)
    store = ArtifactStore(tmp_path / "registry" / "artifacts")
    place = store.directory / hashlib.sha256(b"rows").hexdigest()[:2]
    store.put_bytes(b"rows")
    assert flushed == [tmp_path, tmp_path / "registry", store.directory, place]
    store.put_bytes(b"rows")
    assert flushed[4:] == [store.directory, place]


def test_a_writer_that_fails_leaves_nothing(store: ArtifactStore) -> None:
    with pytest.raises(ZeroDivisionError), store.writer() as path:  # noqa: PT012
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert store.list() == ()
    assert store.leftovers() == ()


@pytest.mark.parametrize("content", [b"", b"rowz", b"rows and more"])
def test_a_changed_artifact_is_named(store: ArtifactStore, content: bytes) -> None:
    digest = store.put_bytes(b"rows")
    spoil(store.path(digest), content)
    with pytest.raises(ArtifactError, match=f"{digest} was changed"):
        store.verify(digest)
    with pytest.raises(ArtifactError, match=f"{digest} was changed"):
        store.read_bytes(digest)


def test_putting_the_content_again_mends_a_changed_artifact(store: ArtifactStore) -> None:
    digest = store.put_bytes(b"rows")
    spoil(store.path(digest), b"rowz")
    store.put_bytes(b"rows")
    assert store.read_bytes(digest) == b"rows"


def test_a_missing_artifact_is_named(store: ArtifactStore) -> None:
    digest = "ab" * 32
    assert not store.contains(digest)
    assert store.list() == ()
    for read in (store.path, store.verify, store.read_bytes):
        with pytest.raises(ArtifactError, match=f"{digest} is not in"):
            read(digest)


@pytest.mark.parametrize("digest", ["", "ab", "../" * 20 + "etc/passwd", "AB" * 32, "ab" * 32 + "\n"])
def test_what_is_no_digest_never_becomes_a_path(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(ArtifactError, match="not a SHA-256 digest"):
        store.path(digest)


def test_a_killed_writer_leaves_no_artifact(store: ArtifactStore) -> None:
    """What a kill leaves is the temporary file, which `list` does not count."""
    with store.writer() as path:
        path.write_bytes(b"half")
        kept = path.with_name("0" * 32 + ".writing")
        os.link(path, kept)
    assert store.list() == ()
    assert store.leftovers() == (kept,)


def test_only_what_is_surely_abandoned_is_removed(store: ArtifactStore) -> None:
    mine = this_process()
    dead, elsewhere = Owner(mine.place, 2**22 + 1, 1), Owner("another.host+-+-+-", 1, 1)
    of_before = Owner(mine.host, 2**22 + 1, 1)
    store.directory.mkdir()
    left = {owner: store.directory / f"{owner.name}.0f0f.writing" for owner in (mine, dead, elsewhere, of_before)}
    for path in left.values():
        path.write_bytes(b"half")
    assert store.remove_abandoned() == (left.pop(dead),)
    assert set(store.leftovers()) == set(left.values())


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactStoreError, match="cannot be written"):
        ArtifactStore(tmp_path / "file" / "artifacts").put_bytes(b"rows")


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_commit_that_fails_leaves_no_artifact(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        with pytest.raises(ArtifactStoreError, match="No space left on device"):
            store.put_bytes(b"rows")
    assert store.list() == ()
    assert store.leftovers() == ()
