"""Streaming SHA-256 digests of files, of the tensors inside them, of a model's weights and of its tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from algorithms.errors import CheckpointError
from algorithms.safetensors_files import StoredTensor
from algorithms.tokenizer_content import TokenizerContent

CHUNK_BYTES = 8 * 1024 * 1024

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


@dataclass(frozen=True)
class FileDigest:
    """Digests of one weight file.

    Attributes:
        file: file name.
        size: size in bytes.
        sha256: SHA-256 of the whole file, in hexadecimal.
        tensors: SHA-256 of the bytes of each tensor, in hexadecimal, by tensor name.
    """

    file: str
    size: int
    sha256: str
    tensors: dict[str, str]


def digest_weight_file(path: Path, tensors: Iterable[StoredTensor], progress: Progress | None = None) -> FileDigest:
    """Digest a file and the given tensors in it in one reading pass.

    Args:
        path: the weight file.
        tensors: tensors whose byte ranges lie in this file, without overlap, in any order.
        progress: told the number of bytes after each chunk.

    Raises:
        CheckpointError: the file cannot be read, or ends before one of the tensors does.
    """
    ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
    whole = hashlib.sha256()
    digests = {tensor.name: hashlib.sha256() for tensor in ordered}
    position, first = 0, 0
    # SHA-256 releases the interpreter lock, so the digest of the file runs beside those of the tensors.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for chunk in _chunks(path):
            pending = pool.submit(whole.update, chunk)
            end = position + len(chunk)
            while first < len(ordered) and ordered[first].end <= position:
                first += 1
            for tensor in ordered[first:]:
                if tensor.begin >= end:
                    break
                digests[tensor.name].update(chunk[max(tensor.begin, position) - position : tensor.end - position])
            pending.result()
            position = end
            if progress is not None:
                progress(len(chunk))
    if ordered and ordered[-1].end > position:
        raise CheckpointError(
            f"{path} has {position} bytes, but tensor {ordered[-1].name} ends at {ordered[-1].end}",
            "Download or save the file again",
        )
    return FileDigest(
        path.name, position, whole.hexdigest(), {name: digest.hexdigest() for name, digest in digests.items()}
    )


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return digest_weight_file(path, ()).sha256


def state_digest(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """One digest of a model's weights, independent of order and of how they are split over files.

    Args:
        tensors: tensor name -> (dtype, shape, SHA-256 of its bytes).

    Returns:
        SHA-256 of the canonical JSON `[[name, dtype, shape, sha256], …]`, sorted by name, in hexadecimal.
    """
    rows = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode("ascii")).hexdigest()


def tokenizer_digest(path: Path) -> str:
    """Digest of what decides which ids a text becomes: vocabulary, merges and added tokens.

    The chat template is left out, and so is how the file is laid out, which differs between library versions.

    Raises:
        CheckpointError: the directory has no tokenizer, or its files are damaged.
    """
    return TokenizerContent.read(path).digest


def _chunks(path: Path) -> Iterator[memoryview]:
    """Chunks of a file. Each is valid only until the next one is asked for."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "Check that it exists and may be read"
        ) from error
