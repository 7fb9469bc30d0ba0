"""Writing model directories: they appear whole or not at all, and tensors go through in blocks of rows."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from algorithms.checkpoints import StoredTensor
from algorithms.errors import CheckpointError
from algorithms.safetensors_files import LENGTH_BYTES

BLOCK_BYTES = 16 * 2**20
"""Size of a block of rows in float32."""
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def require_new_directory(output: Path) -> None:
    """Refuse a directory that holds something, or a file.

    Raises:
        CheckpointError: the output exists and is not an empty directory.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty directory", "Give a directory that does not exist")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `output` when the block ends well; else nothing of it is left.

    Raises:
        CheckpointError: the output exists and is not an empty directory, or cannot be written.
    """
    require_new_directory(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            written = Path(scratch) / "model"
            written.mkdir()
            yield written
            for file in written.iterdir():
                _flush(file)
            written.rename(output)
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}", "Check free space and permissions"
        ) from error


def header_bytes(file: Path) -> bytes:
    """The header of a safetensors file with the length before it, as it stands there."""
    with file.open("rb") as source:
        prefix = source.read(LENGTH_BYTES)
        return prefix + source.read(int.from_bytes(prefix, "little"))


def row_ranges(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    """First row of each block of a tensor that has rows, and the row after its last."""
    height = max(1, BLOCK_BYTES // max(1, 4 * stored.parameters // max(1, stored.shape[0])))
    for start in range(0, stored.shape[0], height):
        yield start, min(start + height, stored.shape[0])


def copied_bytes(directory: Path, stored: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor as they are stored, in blocks.

    Raises:
        CheckpointError: the file ends early.
    """
    with (directory / stored.file).open("rb") as source:
        source.seek(stored.begin)
        left = stored.end - stored.begin
        while left:
            chunk = source.read(min(left, BLOCK_BYTES))
            if not chunk:
                raise CheckpointError(f"{directory / stored.file} ends early", "Download or save the file again")
            left -= len(chunk)
            yield memoryview(chunk)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside the weights: configuration, index, generation settings, tokenizer."""
    for file in sorted(source.iterdir()):
        if file.suffix in _COMPANIONS and file.is_file():
            shutil.copyfile(file, target / file.name)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
