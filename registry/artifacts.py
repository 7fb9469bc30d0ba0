"""The content-addressed store: prompt sets, identifications and patches, each a file named by its SHA-256.

A file is written under a temporary name, flushed, and then renamed, so a digest names the whole content or nothing.
What is kept nobody may write to and whoever the umask lets may read, since another user of the registry may revert.
"""

import errno
import hashlib
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.errors import ArtifactError, ArtifactStoreError
from registry.files import create_file, make_directory, masked, sync_directory
from registry.processes import Owner, this_process

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".writing"


@dataclass(frozen=True)
class ArtifactStore:
    """Files in `directory`, at `ab/cdef…` for the digest `abcdef…`."""

    directory: Path

    @contextmanager
    def writer(self) -> Iterator[Path]:
        """A path in the store for a new file, to be written and given to `commit`, or to `seal` and then `keep`.

        Removed at exit if it was not kept.

        Raises:
            ArtifactStoreError: the store cannot be written.
        """
        temporary = self.directory / f"{this_process().name}.{secrets.token_hex(16)}{_TEMPORARY}"
        try:
            make_directory(self.directory)
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def seal(self, temporary: Path) -> str:
        """Flush a file that `writer` gave and let nobody write to it any more.

        Returns:
            the SHA-256 of its content, in hexadecimal.

        Raises:
            ArtifactStoreError: the store cannot be written.
        """
        try:
            digest = _digest(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(masked(0o444))
        except OSError as error:
            raise self._not_writable(error) from error
        return digest

    def keep(self, temporary: Path, digest: str) -> None:
        """Move a sealed file to its digest.

        Keeping content that is there already replaces the file with the same bytes, which also mends a damaged one.

        Raises:
            ArtifactStoreError: the store cannot be written.
        """
        target = self._target(digest)
        try:
            target.parent.mkdir(exist_ok=True)
            sync_directory(self.directory)  # another process may have made it and not be that far yet
            temporary.replace(target)
            sync_directory(target.parent)
        except OSError as error:
            raise self._not_writable(error) from error

    def commit(self, temporary: Path) -> str:
        """Seal and keep a file that `writer` gave, and return its digest.

        Raises:
            ArtifactStoreError: the store cannot be written.
        """
        digest = self.seal(temporary)
        self.keep(temporary, digest)
        return digest

    def put_bytes(self, content: bytes) -> str:
        """Keep `content` and return its digest.

        Raises:
            ArtifactStoreError: the store cannot be written.
        """
        with self.writer() as temporary:
            try:
                create_file(temporary, content, 0o600)
            except OSError as error:
                raise self._not_writable(error) from error
            return self.commit(temporary)

    def path(self, digest: str) -> Path:
        """Where the artifact lies.

        Raises:
            ArtifactError: not a digest, no such artifact, or its directory is not this user's to look into.
        """
        target = self._target(digest)
        try:
            there = stat.S_ISREG(target.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as error:
            raise self._not_readable(digest, error) from error
        if not there:
            raise ArtifactError(
                f"the artifact {digest} is not in {self.directory}", "Restore the artifact store from a backup"
            )
        return target

    def contains(self, digest: str) -> bool:
        """Whether there is a file for the digest; its content is not read."""
        return self._target(digest).is_file()

    def verify(self, digest: str) -> Path:
        """Read the artifact once, in blocks, and return its path if it has its digest.

        Raises:
            ArtifactError: missing, unreadable, or changed.
        """
        target = self.path(digest)
        try:
            found = _digest(target)
        except OSError as error:
            raise self._not_readable(digest, error) from error
        if found != digest:
            raise self._changed(digest, found)
        return target

    def read_bytes(self, digest: str) -> bytes:
        """The content, checked against its digest.

        Raises:
            ArtifactError: missing, unreadable, or changed.
        """
        try:
            content = self.path(digest).read_bytes()
        except OSError as error:
            raise self._not_readable(digest, error) from error
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise self._changed(digest, found)
        return content

    def list(self) -> tuple[str, ...]:
        """The digests of all artifacts, sorted."""
        return tuple(
            sorted(
                digest
                for file in self.directory.glob("??/*")
                if _DIGEST.fullmatch(digest := file.parent.name + file.name)
            )
        )

    def leftovers(self) -> tuple[Path, ...]:
        """Temporary files of writers that are at work or were killed."""
        return tuple(sorted(self.directory.glob(f"*{_TEMPORARY}")))

    def remove_abandoned(self) -> tuple[Path, ...]:
        """Remove the temporary files of processes that are surely gone, and return them.

        Raises:
            ArtifactStoreError: one cannot be removed.
        """
        abandoned = tuple(path for path in self.leftovers() if _is_abandoned(path))
        try:
            for path in abandoned:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error
        return abandoned

    def _target(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ArtifactError(f"{digest!r} is not a SHA-256 digest", "Give 64 hexadecimal digits")
        return self.directory / digest[:2] / digest[2:]

    def _not_writable(self, error: OSError) -> ArtifactStoreError:
        return ArtifactStoreError(
            f"the artifact store {self.directory} cannot be written: {error.strerror}",
            "Free space, or give yourself write permission",
        )

    def _not_readable(self, digest: str, error: OSError) -> ArtifactError:
        mend = "Restore the artifact store from a backup"
        if error.errno in {errno.EACCES, errno.EPERM}:
            mend = f"Let its owner give you read permission, as with chmod -R g+rX {shlex.quote(str(self.directory))}"
        return ArtifactError(f"the artifact {digest} cannot be read: {error.strerror}", mend)

    @staticmethod
    def _changed(digest: str, found: str) -> ArtifactError:
        return ArtifactError(
            f"the artifact {digest} was changed: its content has the digest {found}",
            "Restore the artifact store from a backup",
        )


def _is_abandoned(temporary: Path) -> bool:
    writer = Owner.named(temporary.name.removesuffix(_TEMPORARY).rpartition(".")[0])
    return writer is not None and writer.liveness == "dead"


def _digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
