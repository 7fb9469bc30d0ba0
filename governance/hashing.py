"""Hashing a model's weight files, several at a time, so that an interrupted registration goes on where it stopped.

Each finished file is noted in a journal beside the registry. A note counts only for the very same file: path, size,
times of modification and of change, and inode. The journal goes once the model is registered.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from algorithms.checkpoints import StoredTensor
from algorithms.digests import TENSOR_ALGORITHM, FileDigest, digest_weight_file
from algorithms.parallel import in_parallel
from governance.workspace import Progress, no_progress
from registry.files import write_all


@dataclass(frozen=True)
class HashJournal:
    """Notes of files that are hashed already."""

    path: Path

    @classmethod
    def of(cls, registry: Path, model: Path) -> "HashJournal":
        """The journal of a model's directory in a registry's directory."""
        return cls(registry / f"hashing-{hashlib.sha256(str(model).encode()).hexdigest()[:16]}.jsonl")

    def find(self, file: Path) -> FileDigest | None:
        """The digests of a file, if they were noted and it has not changed since."""
        if not self.path.is_file():
            return None
        key = _key(file)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                note = json.loads(line)
                if note["key"] == key and note["algorithm"] == TENSOR_ALGORITHM:
                    return FileDigest(**note["digests"])
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill left unfinished
        return None

    def add(self, file: Path, digests: FileDigest) -> None:
        """Note a file's digests."""
        fields = {
            "file": digests.file,
            "size": digests.size,
            "sha256": digests.sha256,
            "tensors": digests.tensors,
        }
        note = {"key": _key(file), "algorithm": TENSOR_ALGORITHM, "digests": fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)  # of a new registry in PostgreSQL it is not there yet
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            write_all(descriptor, (json.dumps(note) + "\n").encode())
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Forget the notes."""
        self.path.unlink(missing_ok=True)


def hash_files(
    directory: Path,
    files: Sequence[str],
    tensors: Sequence[StoredTensor],
    progress: Progress = no_progress,
    journal: HashJournal | None = None,
) -> dict[str, FileDigest]:
    """Hash weight files whole, and the tensors in them, reading each byte once.

    Args:
        directory: where the files lie.
        files: their names.
        tensors: the tensors of all of them.
        progress: told after each file, in their order.
        journal: where finished files are noted, in their order, and looked up.

    Raises:
        CheckpointError: a file cannot be read; the first of them is named.
    """
    found: dict[str, FileDigest] = {}
    for file in files:
        if journal is not None and (noted := journal.find(directory / file)) is not None:
            found[file] = noted
    contained = {file: [tensor for tensor in tensors if tensor.file == file] for file in files}
    missing = [file for file in files if file not in found]
    progress("hashing weights", len(found), len(files))
    with closing(in_parallel(lambda file: digest_weight_file(directory / file, contained[file]), missing)) as hashed:
        for file, digests in zip(missing, hashed, strict=True):
            found[file] = digests
            if journal is not None:
                journal.add(directory / file, digests)
            progress("hashing weights", len(found), len(files))
    return found


def _key(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
