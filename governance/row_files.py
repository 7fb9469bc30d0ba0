"""Rows of a full checkpoint's files: spliced in memory to know the digests, and rewritten in place.

Only byte ranges of changed rows are written. Where a module is stored transposed a row is a column of the file, and
the storage rows that it crosses are rewritten with the other columns as they are.
"""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from algorithms.buffers import borrowed
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.digests import TENSOR_ALGORITHM, ExpectedContent, new_checksum, new_hash, read_pieces
from algorithms.parallel import in_parallel, trailing
from governance.errors import SpaceError, WeightsChangedError
from governance.patch_artifact import BLOCK_BYTES, ArtifactModule, PatchArtifact, Side
from governance.tensor_file import DTYPES, tensor_bytes
from registry.files import write_at


@dataclass(frozen=True)
class TensorChange:
    """One tensor as it is, and once rows are rewritten.

    Attributes:
        tensor: its name in the file.
        before: its digest now.
        after: what it will hold.
        replaces: whether the rows that will be rewritten are now those of the artifact's other side.
    """

    tensor: str
    before: str
    after: ExpectedContent
    replaces: bool


def tensor_changes(
    checkpoint: Checkpoint,
    artifact: PatchArtifact,
    side: Side,
    algorithms: Mapping[str, str],
    computed: Iterable[ArtifactModule] | None = None,
) -> dict[str, TensorChange]:
    """Read every touched tensor once: its digest now, and what it will hold once the rows are `side` of the artifact.

    Args:
        checkpoint: the working checkpoint.
        artifact: the rows.
        side: `new` to apply, `old` to take back.
        algorithms: tensor name → the algorithm that its recorded digest is in.
        computed: the artifact's modules, each given once its rows are there: its tensor is read in another thread
            while what gives them computes the next. If left out, all are there.

    Raises:
        CheckpointError: a file cannot be read, or ends early.
        WeightsChangedError: a tensor is of another shape or dtype than the rows.
    """

    other: Side = "old" if side == "new" else "new"

    def change(module: ArtifactModule) -> TensorChange:
        _require_fit(checkpoint, artifact, module)
        algorithm = algorithms.get(module.tensor, TENSOR_ALGORITHM)
        before, after, checksum = new_hash(algorithm), new_hash(algorithm), new_checksum()
        rows = artifact.rows(module.name)
        replaces = True
        for block in tensor_blocks(checkpoint.path, checkpoint.stored(module.tensor)):
            before.update(block.content)
            replaces = replaces and _holds(block, artifact, module, other, rows)
            splice(block, artifact, module, side, rows)
            after.update(block.content)
            checksum.update(block.content)
        expected = ExpectedContent(after.hexdigest(), checksum.hexdigest())
        return TensorChange(module.tensor, before.hexdigest(), expected, replaces)

    def size(module: ArtifactModule) -> int:
        stored = checkpoint.stored(module.tensor)
        return stored.end - stored.begin

    changes = in_parallel(change, artifact.modules, size) if computed is None else in_parallel(change, computed)
    return {changed.tensor: changed for changed in changes}


def write_rows(checkpoint: Checkpoint, artifact: PatchArtifact, side: Side) -> tuple[str, ...]:
    """Rewrite the artifact's rows in place and flush them to the disk.

    Args and Raises: as `writing_rows`.

    Returns:
        Names of the files that were written to.
    """
    return tuple(writing_rows(checkpoint, artifact, side))


def writing_rows(checkpoint: Checkpoint, artifact: PatchArtifact, side: Side) -> Generator[str, None, None]:
    """Rewrite the artifact's rows in place, file by file; each is flushed to the disk while the next is written.

    Args:
        checkpoint: the working checkpoint, opened afresh.
        artifact: the rows.
        side: `new` to apply, `old` to take back.

    Yields:
        The name of each file, once it is flushed. Once it is closed, no thread is at work on a file any more.

    Raises:
        OSError: a file cannot be opened, written or flushed.
        WeightsChangedError: a tensor is of another shape or dtype than the rows; nothing was written.
    """
    by_file: dict[str, list[ArtifactModule]] = {}
    for module in artifact.modules:
        _require_fit(checkpoint, artifact, module)
        by_file.setdefault(checkpoint.stored(module.tensor).file, []).append(module)

    def written() -> Iterator[_InPlaceFile]:
        for file, modules in by_file.items():
            with ExitStack() as held:
                target = held.enter_context(closing(_InPlaceFile(checkpoint.path / file)))
                for module in modules:
                    _write_module(target, checkpoint, artifact, module, side)
                held.pop_all()  # who flushes it closes it
            yield target

    yield from trailing(_flushed, written())


def fits(stored: StoredTensor | None, artifact: PatchArtifact, module: ArtifactModule) -> bool:
    """Whether a stored tensor has the dtype and width of a module's rows in the artifact, and every one of the rows."""
    if stored is None or len(stored.shape) != 2 or stored.dtype != module.dtype:
        return False
    length, width = stored.shape[::-1] if module.transposed else stored.shape
    rows = artifact.rows(module.name)
    return module.width == width and (not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < length)


def _require_fit(checkpoint: Checkpoint, artifact: PatchArtifact, module: ArtifactModule) -> None:
    if not fits(checkpoint.stored(module.tensor), artifact, module):
        raise WeightsChangedError(
            f"{module.tensor} of {checkpoint.path} is of another shape or dtype than the rows of the patch",
            "restore the file that holds it from a copy, then run neuronledger recover",
        )


def shared_error(path: Path, paths: int) -> SpaceError:
    """The error for a file that other paths share: a write into it would change more than the lineage's own."""
    return SpaceError(f"{path} is shared by {paths} paths", "replace it by a copy of its own (cp, then mv over it)")


def _flushed(target: "_InPlaceFile") -> str:
    with closing(target):
        target.sync()
    return target.path.name


@dataclass(frozen=True)
class Block:
    """Storage rows `start` to `stop` of a tensor; `content` are their bytes, `rows` the same as (rows, row bytes)."""

    start: int
    stop: int
    content: memoryview

    @property
    def rows(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        flat = np.frombuffer(self.content, dtype=np.uint8)
        return flat.reshape(self.stop - self.start, -1)


class _InPlaceFile:
    """A file that is rewritten in place, and that no other path shares.

    Raises:
        SpaceError: another path shares it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        if (paths := os.fstat(self._descriptor).st_nlink) > 1:
            os.close(self._descriptor)
            raise shared_error(path, paths)

    def put(self, offset: int, content: bytes | memoryview) -> None:
        try:
            write_at(self._descriptor, content, offset)
        except OSError as error:
            raise self._named(error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        """A descriptor's errors do not say which file."""
        return OSError(error.errno, error.strerror, str(self.path))

    def close(self) -> None:
        os.close(self._descriptor)


def _write_module(
    target: _InPlaceFile, checkpoint: Checkpoint, artifact: PatchArtifact, module: ArtifactModule, side: Side
) -> None:
    stored = checkpoint.stored(module.tensor)
    rows = artifact.rows(module.name)
    if module.transposed:
        for block in tensor_blocks(checkpoint.path, stored):
            splice(block, artifact, module, side, rows)
            target.put(stored.begin + block.start * stored.row_bytes, block.content)
        return
    size = stored.row_bytes
    height = max(1, BLOCK_BYTES // size)
    with borrowed(height * size) as content:
        for first in range(0, len(rows), height):
            some = rows[first : first + height]
            artifact.read_into(content[: len(some) * size], module.name, side, first)
            for row, begin, end in _runs(some):
                target.put(stored.begin + row * size, content[begin * size : end * size])


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Rows that follow one another in the file: the first row, and the half-open range of their positions."""
    begins = [0, *(torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist()]
    yield from zip(rows[begins].tolist(), begins, [*begins[1:], len(rows)], strict=True)


def tensor_blocks(directory: Path, stored: StoredTensor) -> Iterator[Block]:
    """A whole stored tensor in blocks of storage rows, each valid only until reading goes on or ends.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    if stored.begin == stored.end:
        return
    rows = stored.shape[0] if stored.shape else 1
    height = max(1, BLOCK_BYTES // stored.row_bytes)
    pieces = read_pieces(directory / stored.file, stored.begin, stored.end, height * stored.row_bytes)
    for start, piece in zip(range(0, rows, height), pieces, strict=True):
        yield Block(start, min(start + height, rows), piece)


def _holds(block: Block, artifact: PatchArtifact, module: ArtifactModule, side: Side, rows: Tensor) -> bool:
    """Whether a block has the artifact's rows where they belong."""
    places = rows.numpy()
    if module.transposed:
        item = DTYPES[module.dtype].itemsize
        held = tensor_bytes(artifact.columns(module.name, side, block.start, block.stop).T)
        entries = block.rows.reshape(block.stop - block.start, -1, item)[:, places]
        return bool(np.array_equal(entries, np.frombuffer(held, np.uint8).reshape(entries.shape)))
    first, last = np.searchsorted(places, (block.start, block.stop)).tolist()
    if first == last:
        return True
    found = block.rows[places[first:last] - block.start]
    with borrowed(found.size) as held:
        artifact.read_into(held, module.name, side, first)
        return bool(np.array_equal(found.ravel(), np.frombuffer(held, np.uint8)))


def splice(block: Block, artifact: PatchArtifact, module: ArtifactModule, side: Side, rows: Tensor) -> None:
    """Put the artifact's rows into a block; `rows` are what `artifact.rows` says of the module."""
    places = rows.numpy()
    if module.transposed:
        item = DTYPES[module.dtype].itemsize
        new = tensor_bytes(artifact.columns(module.name, side, block.start, block.stop).T)
        entries = block.rows.reshape(block.stop - block.start, -1, item)
        entries[:, places] = np.frombuffer(new, np.uint8).reshape(len(entries), -1, item)
        return
    first, last = np.searchsorted(places, (block.start, block.stop)).tolist()
    if first < last:
        size = len(block.content) // (block.stop - block.start)
        begins = ((places[first:last] - block.start) * size).tolist()
        artifact.read_scattered([block.content[begin : begin + size] for begin in begins], module.name, side, first)
