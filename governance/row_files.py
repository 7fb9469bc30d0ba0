"""Rows of a full checkpoint's files: spliced in memory to know the digests, and rewritten in place.

Only byte ranges of changed rows are written. Where a module is stored transposed a row is a column of the file, and
the storage rows that it crosses are rewritten with the other columns as they are.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from algorithms.checkpoints import Checkpoint, StoredTensor
from governance.patch_artifact import ArtifactModule, PatchArtifact, Side
from governance.tensor_file import tensor_bytes, write_at

_BLOCK = 32 * 2**20


@dataclass(frozen=True)
class TensorChange:
    """The SHA-256 of one tensor as it is and as it will be once rows are rewritten."""

    tensor: str
    before: str
    after: str


def tensor_changes(checkpoint: Checkpoint, artifact: PatchArtifact, side: Side) -> dict[str, TensorChange]:
    """Read every touched tensor once and return its digest now and after the rows become `side` of the artifact."""
    changes = {}
    for module in artifact.modules:
        before, after = hashlib.sha256(), hashlib.sha256()
        for _, current, spliced in _spliced(checkpoint, artifact, module, side):
            before.update(tensor_bytes(current))
            after.update(tensor_bytes(spliced))
        changes[module.tensor] = TensorChange(module.tensor, before.hexdigest(), after.hexdigest())
    return changes


def write_rows(checkpoint: Checkpoint, artifact: PatchArtifact, side: Side) -> tuple[str, ...]:
    """Rewrite the artifact's rows in place and flush them to the disk.

    Args:
        checkpoint: the working checkpoint, opened afresh.
        artifact: the rows.
        side: `new` to apply, `old` to take back.

    Returns:
        Names of the files that were written to.

    Raises:
        OSError: a file cannot be opened, written or flushed.
    """
    by_file: dict[str, list[ArtifactModule]] = {}
    for module in artifact.modules:
        by_file.setdefault(checkpoint.stored(module.tensor).file, []).append(module)
    for file, modules in by_file.items():
        with closing(_InPlaceFile(checkpoint.path / file)) as target:
            for module in modules:
                _write_module(target, checkpoint, artifact, module, side)
            target.sync()
    return tuple(by_file)


class _InPlaceFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)

    def put(self, offset: int, content: bytes) -> None:
        with self._named():
            write_at(self._descriptor, content, offset)

    def sync(self) -> None:
        with self._named():
            os.fsync(self._descriptor)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A descriptor's errors do not say which file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        os.close(self._descriptor)


def _write_module(
    target: _InPlaceFile, checkpoint: Checkpoint, artifact: PatchArtifact, module: ArtifactModule, side: Side
) -> None:
    stored = checkpoint.stored(module.tensor)
    if module.transposed:
        for start, _, spliced in _spliced(checkpoint, artifact, module, side):
            target.put(stored.begin + start * stored.row_bytes, tensor_bytes(spliced))
        return
    rows = artifact.rows(module.name)
    for first, last in _runs(rows, max(1, _BLOCK // stored.row_bytes)):
        offset = stored.begin + int(rows[first]) * stored.row_bytes
        target.put(offset, tensor_bytes(artifact.values(module.name, side, first, last)))


def _runs(rows: Tensor, longest: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions whose rows follow one another in the file, none longer than `longest`."""
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and last - first < longest and rows[last] == rows[last - 1] + 1:
            last += 1
        yield first, last
        first = last


def _spliced(
    checkpoint: Checkpoint, artifact: PatchArtifact, module: ArtifactModule, side: Side
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first storage row, block as it is, block with the artifact's rows) over the whole stored tensor."""
    stored = checkpoint.stored(module.tensor)
    rows = artifact.rows(module.name)
    for start, stop in _blocks(stored):
        current = checkpoint.read(module.tensor, start, stop)
        spliced = current.clone()
        if module.transposed:
            spliced[:, rows] = artifact.columns(module.name, side, start, stop).T
        else:
            bounds = torch.searchsorted(rows, torch.tensor([start, stop]))
            first, last = int(bounds[0]), int(bounds[1])
            spliced[rows[first:last] - start] = artifact.values(module.name, side, first, last)
        yield start, current, spliced


def _blocks(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    height = max(1, _BLOCK // stored.row_bytes)
    for start in range(0, stored.shape[0], height):
        yield start, min(start + height, stored.shape[0])
