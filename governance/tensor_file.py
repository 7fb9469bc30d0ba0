"""Safetensors files written piece by piece: a patch artifact may be larger than memory.

The safetensors library writes a file only from tensors that are all in memory. Its format is a length, a
JSON header and the bytes, so shapes that are known beforehand are enough to write in any order.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from algorithms.safetensors_files import read_header, read_ranges, read_scattered
from registry.files import write_at

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_CLOSED = -1
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (safetensors' name, such as `BF16`) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        count = DTYPES[self.dtype].itemsize
        for length in self.shape[1:]:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.row_bytes * self.shape[0]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements, row-major and little-endian, as they stand in a safetensors file."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; nothing of the file stays in memory.

    Raises:
        CheckpointError: the file cannot be read, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.metadata: Mapping[str, str] = header.metadata or {}
        self.stored = header.tensors

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Read a tensor, or the indices `first..last` of its first dimension.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the file cannot be read, or ends early.
        """
        stored = self.stored[name]
        last = stored.shape[0] if last is None else last
        content = torch.empty((last - first) * stored.row_bytes, dtype=torch.uint8)
        self.read_into(content.numpy().data, name, first)
        return content.view(DTYPES[stored.dtype]).view(last - first, *stored.shape[1:])

    def read_into(self, view: memoryview, name: str, first: int = 0) -> None:
        """Fill `view` with bytes of a tensor from index `first` of its first dimension on.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: the file cannot be read, or ends early.
        """
        stored = self.stored[name]
        read_ranges(self.path, [(stored.begin + first * stored.row_bytes, len(view))], view)

    def read_scattered(self, views: Sequence[memoryview], name: str, first: int = 0) -> None:
        """Fill views, one after the other, as `read_into` fills one."""
        stored = self.stored[name]
        read_scattered(self.path, stored.begin + first * stored.row_bytes, views)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the first tensor of a safetensors file whose tensors lie in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in specs:
        end = position + spec.bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), sort_keys=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFileWriter:
    """Writes one safetensors file whose tensors are all declared first.

    Args:
        path: file to create; it must not exist.
        specs: the tensors, laid out in this order.
        metadata: text to text, kept in the header.
        flush: whether leaving it flushes the file to the disk; if not, somebody else does.

    Raises:
        OSError: the file cannot be created or written.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str], *, flush: bool = True
    ) -> None:
        self._flush = flush
        self._offsets: dict[str, tuple[int, TensorSpec]] = {}
        position = 0
        for spec in specs:
            self._offsets[spec.name] = (position, spec)
            position += spec.bytes
        prefix = header_bytes(specs, metadata)
        self._begin = len(prefix)
        self._length = self._begin + position
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_at(self._descriptor, prefix, 0)
            os.ftruncate(self._descriptor, self._length)
        except OSError:
            os.close(self._descriptor)
            raise

    def put(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write `tensor` into the named tensor from index `row` of its first dimension on.

        Raises:
            OSError: it cannot be written, or the file is closed.
        """
        offset, spec = self._offsets[name]
        if DTYPE_NAMES[tensor.dtype] != spec.dtype or row + tensor.shape[0] > spec.shape[0]:
            raise ValueError(f"{name}: {tuple(tensor.shape)} of {tensor.dtype} does not fit {spec}")
        write_at(self._descriptor, tensor_bytes(tensor), self._begin + offset + row * spec.row_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        descriptor, self._descriptor = self._descriptor, _CLOSED
        try:
            if kind is None and self._flush:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
