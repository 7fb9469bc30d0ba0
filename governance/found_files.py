"""Files as they are found on disk, beside what they should be: a damaged one is described, never an error.

A weight file's tensors are looked for where its layout puts them. A file with another header is read by its own, as
long as that can be read at all, so that a file which was saved anew is still compared tensor by tensor.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from algorithms.digests import read_pieces
from algorithms.errors import CheckpointError
from algorithms.safetensors_files import SafetensorsHeader, StoredTensor, read_header, require_regular_file
from governance.weight_differences import SHOWN, Difference, Kind
from governance.working_checkpoint import copied_files

Bytes = npt.NDArray[np.uint8]

_MAX_JSON_BYTES = 2**20
_NOTHING: Bytes = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True)
class Layout:
    """What a weight file should be, but for the content of its tensors.

    Attributes:
        file: its name.
        prefix: the bytes before the first tensor: the header and its length.
        metadata: `__metadata__` of the header.
        tensors: its tensors in the order in which they lie there.
    """

    file: str
    prefix: bytes
    metadata: Mapping[str, str] | None
    tensors: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.tensors[-1].end if self.tensors else len(self.prefix)


class FoundFile:
    """A weight file that should have a layout, open for reading.

    Args:
        directory: where it lies.
        layout: what it should be.

    Attributes:
        differences: what is wrong with the file as a whole, its header and the places of its tensors.
        compared: how many of its bytes have been read.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.differences: list[Difference] = []
        self.compared = 0
        self._path, self._layout = directory / layout.file, layout
        self._places: dict[str, int] = {}
        self._file: BinaryIO | None = None
        try:
            require_regular_file(self._path)
            self._file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            self._note("file", "is missing")
        except OSError as error:
            self._note("file", f"cannot be read ({error.strerror or error})")
        except CheckpointError:
            self._note("file", "is not a regular file")
        else:
            self._locate(os.fstat(self._file.fileno()).st_size)

    def read(self, tensor: str, offset: int, size: int) -> Bytes:
        """Up to `size` bytes of a tensor from `offset` on: fewer where the file ends early, none where it has no such
        tensor."""
        place = self._places.get(tensor)
        return _NOTHING if place is None else self._read(place + offset, size)

    def has(self, tensor: str) -> bool:
        """Whether there is a place to look for a tensor."""
        return self._file is not None and tensor in self._places

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, begin: int, size: int) -> Bytes:
        if self._file is None:
            return _NOTHING
        content = np.empty(size, dtype=np.uint8)
        view, filled = content.data, 0
        try:
            self._file.seek(begin)
            while filled < size and (count := self._file.readinto(view[filled:])):  # type: ignore[attr-defined]
                filled += count
        except OSError as error:
            self._note("file", f"cannot be read beyond byte {begin + filled:,} ({error.strerror or error})")
            self._file.close()
            self._file = None
        self.compared += filled
        return content[:filled]

    def _locate(self, size: int) -> None:
        layout = self._layout
        if self._read(0, len(layout.prefix)).tobytes() != layout.prefix:
            try:
                header = read_header(self._path)
            except CheckpointError as error:
                self._note(
                    "header", f"its header is damaged, so tensors are looked for where they should lie: {error.problem}"
                )
            else:
                self._compare_headers(header)
                return
        self._places = {tensor.name: tensor.begin for tensor in layout.tensors}
        if size < layout.size:
            self._note("file", f"ends {layout.size - size:,} bytes early, at byte {size:,}")
        elif size > layout.size:
            self._note("file", f"has {size - layout.size:,} bytes after its last tensor")

    def _compare_headers(self, header: SafetensorsHeader) -> None:
        before = len(self.differences)
        if header.metadata != self._layout.metadata:
            expected, found = self._layout.metadata or {}, header.metadata or {}
            keys = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
            self._note("header", f"its __metadata__ is another ({', '.join(keys) or 'none instead of an empty one'})")
        expected_names = {tensor.name for tensor in self._layout.tensors}
        for tensor in self._layout.tensors:
            held = header.tensors.get(tensor.name)
            if held is None:
                self._note("tensor", "is missing", tensor.name)
            elif (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
                what = f"has dtype {held.dtype} and shape {held.shape}, not {tensor.dtype} and {tensor.shape}"
                self._note("tensor", what, tensor.name)
            else:
                self._places[tensor.name] = held.begin
        for name in header.tensors:
            if name not in expected_names:
                self._note("tensor", "was added", name)
        if len(self.differences) == before:
            self._note("header", "its header has other bytes, though it declares the same tensors and metadata")

    def _note(self, kind: Kind, problem: str, tensor: str | None = None) -> None:
        self.differences.append(Difference(kind, problem, self._layout.file, tensor))


def layout_of(directory: Path, file: str) -> Layout:
    """The layout that a weight file has.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.
    """
    header = read_header(directory / file)
    with (directory / file).open("rb") as opened:
        prefix = opened.read(header.data_begin)
    return Layout(file, prefix, header.metadata, tuple(header.tensors.values()))


@dataclass(frozen=True)
class PlainFiles:
    """What was found of the files that hold no weights, and how many files and bytes were compared."""

    differences: tuple[Difference, ...]
    files: int
    compared: int


def compare_plain_files(
    working: Path, subject: Path, weight_files: Collection[str], contents: Mapping[str, bytes]
) -> PlainFiles:
    """Compare every file of a working checkpoint but its weight files: configuration, index, tokenizer, and the rest.

    Args:
        working: the directory.
        subject: the directory of the subject, whose files these should be.
        weight_files: names of the files that are left out.
        contents: files that should have another content than the subject's.

    Raises:
        CheckpointError: a file of the subject cannot be read.
    """
    expected: dict[str, Path | bytes] = {path.relative_to(subject).as_posix(): path for path in copied_files(subject)}
    expected.update(contents)
    present = {
        path.relative_to(working).as_posix() for path in working.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    differences: list[Difference] = []
    files = compared = 0
    for name in sorted(expected.keys() - set(weight_files)):
        if name not in present:
            differences.append(Difference("file", "is missing", name))
            continue
        problem = _compare(working / name, expected[name])
        if problem is not None:
            differences.append(Difference("file", problem, name))
        files += 1
        compared += _size(expected[name])
    added = sorted(present - expected.keys() - set(weight_files))
    differences += [Difference("file", "was added", name) for name in added]
    return PlainFiles(tuple(differences), files, compared)


def _size(expected: Path | bytes) -> int:
    return len(expected) if isinstance(expected, bytes) else expected.stat().st_size


def _compare(path: Path, expected: Path | bytes) -> str | None:
    """What is wrong with a file, if anything."""
    if not path.is_file():
        return "is not a regular file"
    size, offset = _size(expected), 0
    pieces = [memoryview(expected)] if isinstance(expected, bytes) else read_pieces(expected, 0, size)
    try:
        with path.open("rb", buffering=0) as file:
            for piece in pieces:
                same = _same_bytes(_read(file, len(piece)), piece)
                offset += same
                if same < len(piece):
                    return f"differs from byte {offset:,} on{_differing_keys(path, expected)}"
            more = os.fstat(file.fileno()).st_size - size
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return f"has {more:,} bytes more than it should" if more > 0 else None


def _read(file: BinaryIO, size: int) -> bytes:
    content = bytearray()
    while len(content) < size and (more := file.read(size - len(content))):
        content += more
    return bytes(content)


def _same_bytes(found: bytes, expected: memoryview) -> int:
    """How many bytes at the beginning are the same."""
    shorter = min(len(found), len(expected))
    differs = np.frombuffer(found, np.uint8, shorter) != np.frombuffer(expected, np.uint8, shorter)
    return int(differs.argmax()) if differs.any() else shorter


def _differing_keys(path: Path, expected: Path | bytes) -> str:
    """Which keys of a small JSON file differ, for whoever reads the message."""
    if path.suffix != ".json" or max(_size(expected), path.stat().st_size) > _MAX_JSON_BYTES:
        return ""
    try:
        should = json.loads(expected if isinstance(expected, bytes) else expected.read_bytes())
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return ""
    if not isinstance(should, dict) or not isinstance(found, dict):
        return ""
    differing = sorted(key for key in {*should, *found} if should.get(key) != found.get(key))
    return f" ({', '.join(differing[:SHOWN])})" if differing else " (the same content, written differently)"
