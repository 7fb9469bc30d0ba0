"""The header of one safetensors file, read and checked without touching its tensors.

A header comes from whoever made the checkpoint, so nothing in it is believed: every length, offset and shape
is checked against the size of the file before anything is read, and the reference parser of `safetensors`
must agree. What the format asks (https://github.com/huggingface/safetensors, "Format"): eight bytes of
little-endian length, a JSON object of that many bytes that begins with `{` and repeats no key, and
a buffer that the tensors cover entirely, without holes and without overlap.
"""

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import safetensors

from algorithms.errors import CheckpointError

LENGTH_BYTES = 8
_MOST_VIEWS = 1024
"""How many places one call of the system reads to (IOV_MAX)."""
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    }
)  # fmt: skip

WRITTEN_AGAIN = "Download or save the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk.

    Attributes:
        name: name in the checkpoint, `model.layers.0.self_attn.q_proj.weight`.
        dtype: dtype as safetensors writes it: `BF16`, `F16`, `F32` for weights.
        shape: stored shape; GPT-2's Conv1D stores `(in, out)`, everything else `(out, in)`.
        file: file name inside the checkpoint directory.
        begin: first byte of the tensor, counted from the start of the file.
        end: first byte after the tensor, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of dimension 0 (of the whole tensor, when it has no dimension)."""
        return math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the head of a safetensors file says.

    Attributes:
        file: file name.
        size: size of the file in bytes.
        modified_ns: when it was last written, in nanoseconds, as it stood when the header was read.
        data_begin: offset of the tensor buffer.
        sha256: SHA-256 of the bytes before it, in hexadecimal.
        metadata: the `__metadata__` object, or None when the file has none.
        tensors: tensors by name, in the order of their offsets.
    """

    file: str
    size: int
    modified_ns: int
    data_begin: int
    sha256: str
    metadata: Mapping[str, str] | None
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Args:
        path: the file; a symbolic link is followed (the Hugging Face cache is made of them).

    Raises:
        CheckpointError: the file cannot be read, is truncated or too long, or its header breaks the format.
    """
    try:
        require_regular_file(path)
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            raw = _header_bytes(file, path, size)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "Check that it exists and may be read"
        ) from error
    header = parse_json_object(raw, str(path), WRITTEN_AGAIN)
    data_begin = LENGTH_BYTES + len(raw)
    metadata = _metadata(header.pop("__metadata__", None), path)
    tensors = [_tensor(name, entry, path, data_begin, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_cover(tensors, path, data_begin, size)
    _check_agreement(path, tensors)
    return SafetensorsHeader(
        file=path.name,
        size=size,
        modified_ns=status.st_mtime_ns,
        data_begin=data_begin,
        sha256=hashlib.sha256(len(raw).to_bytes(LENGTH_BYTES, "little") + raw).hexdigest(),
        metadata=metadata,
        tensors=MappingProxyType({tensor.name: tensor for tensor in tensors}),
    )


def parse_json_object(raw: bytes, name: str, mend: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice and no lone surrogate in a key, at any depth.

    Args:
        raw: the bytes.
        name: what to call them in an error.
        mend: what the user can do about it.

    Raises:
        CheckpointError: the bytes are not such an object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            repeated = Counter(key for key, _ in items).most_common(1)[0][0]
            raise CheckpointError(f"{name} repeats the key {repeated!r}", mend)
        for key in result:
            key.encode("utf-8")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} does not hold valid JSON: {error}", mend) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__}, not an object", mend)
    return value


def read_json_file(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, unreadable, larger than 100 MB, or not a JSON object.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", mend) from error
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", mend)
    return parse_json_object(raw, str(path), mend)


def require_regular_file(path: Path) -> None:
    """Refuse pipes, devices and directories, which could block or never end.

    Raises:
        CheckpointError: the path, links followed, is something else than a file.
        OSError: it does not exist.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path} is not a regular file", WRITTEN_AGAIN)


def read_exactly(file: BinaryIO, view: memoryview, path: Path) -> None:
    """Fill `view` from the current position of an unbuffered file.

    Raises:
        CheckpointError: the file ends before.
    """
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{path} ends {len(view) - filled} bytes early", WRITTEN_AGAIN)
        filled += count


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]], view: memoryview) -> None:
    """Fill `view` with ranges `(begin, size)` of a file, one after the other, opening the file once.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    with _opened(path) as descriptor:
        for begin, size in ranges:
            _fill([view[:size]], descriptor, begin, path)
            view = view[size:]


def read_scattered(path: Path, begin: int, views: Sequence[memoryview]) -> None:
    """Fill views, one after the other, with the bytes of a file from `begin` on.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    with _opened(path) as descriptor:
        for first in range(0, len(views), _MOST_VIEWS):
            some = list(views[first : first + _MOST_VIEWS])
            size = sum(map(len, some))
            _fill(some, descriptor, begin, path)
            begin += size


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file to read, by the system's calls alone: a patch reads tens of thousands of rows."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "Check that it exists and may be read"
        ) from error


def _fill(left: list[memoryview], descriptor: int, begin: int, path: Path) -> None:
    """Fill views, which are taken from the list, however often the system reads only part of it."""
    while left:
        count = os.preadv(descriptor, left, begin)
        begin += count
        if not count and any(left):
            raise CheckpointError(f"{path} ends {sum(map(len, left))} bytes early", WRITTEN_AGAIN)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file", WRITTEN_AGAIN)
    prefix = bytearray(LENGTH_BYTES)
    read_exactly(file, memoryview(prefix), path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} declares a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}", WRITTEN_AGAIN
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(f"{path} declares a header of {length:,} bytes, but the file has {size:,}", WRITTEN_AGAIN)
    raw = bytearray(length)
    read_exactly(file, memoryview(raw), path)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"the header of {path} does not begin with '{{'", WRITTEN_AGAIN)
    return bytes(raw)


def _metadata(value: object, path: Path) -> Mapping[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"__metadata__ of {path} is not an object of strings", WRITTEN_AGAIN)
    return MappingProxyType(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _fits(shape: list[int], bits: int, size: int) -> bool:
    """Whether shape and dtype take `size` bytes. Stops early: a hostile shape could make the product astronomic."""
    if 0 in shape:
        return size == 0
    for length in shape:
        bits *= length
        if bits > size * 8:
            return False
    return bits == size * 8


def _tensor(name: str, entry: object, path: Path, data_begin: int, size: int) -> StoredTensor:
    def wrong(problem: str) -> CheckpointError:
        return CheckpointError(
            f"tensor {name if name.isprintable() else repr(name)} of {path} {problem}", WRITTEN_AGAIN
        )

    if not name or not name.isprintable():
        raise wrong("has a name that cannot be shown, so no message could name it")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise wrong(f"has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise wrong(f"has the impossible offsets {offsets!r}")
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    if begin > end or end > size:
        raise wrong(f"lies at bytes {begin} to {end} of a file of {size} bytes")
    if not _fits(shape, DTYPE_BITS[dtype], end - begin):
        raise wrong(f"has shape {tuple(shape)} and dtype {dtype}, but {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), path.name, begin, end)


def _check_cover(tensors: list[StoredTensor], path: Path, data_begin: int, size: int) -> None:
    position = data_begin
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise CheckpointError(f"tensor {tensor.name} of {path} {fault}", WRITTEN_AGAIN)
        position = tensor.end
    if position != size:
        raise CheckpointError(f"{path} has {size - position} bytes that belong to no tensor", WRITTEN_AGAIN)


def _check_agreement(path: Path, tensors: list[StoredTensor]) -> None:
    """The parser that will load the model must see the same tensors as this one."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = set(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is refused by safetensors: {error}", WRITTEN_AGAIN) from error
    if names != {tensor.name for tensor in tensors}:
        raise CheckpointError(f"{path} is read differently by safetensors", WRITTEN_AGAIN)
