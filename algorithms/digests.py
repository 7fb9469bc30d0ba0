"""Streaming digests of files, of the tensors inside them, of a model's weights and of its tokenizer.

A whole file has a SHA-256, which the Hugging Face hub and `sha256sum` give too. A tensor has a BLAKE3 digest: tensors
are hashed again at every patch, and BLAKE3 reads about four times as fast on one core. Every record of a digest names
its algorithm, and a digest is always compared in the algorithm that it was recorded in.

Where the same process knows beforehand which bytes it will read back, it compares a checksum instead (XXH3, 128 bits):
it costs little more than reading. Its seed is drawn anew in each process, and no checksum is recorded or shown.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blake3 import blake3
from xxhash import xxh3_128

from algorithms.buffers import borrowed
from algorithms.errors import CheckpointError
from algorithms.safetensors_files import StoredTensor, read_exactly
from algorithms.tokenizer_content import TokenizerContent

CHUNK_BYTES = 2**20
"""How much of a file is read at once where two threads hash it: handing over a chunk takes time too."""
PIECE_BYTES = 2**18
"""How much is read at once where one thread hashes it."""
SHA256 = "sha256"
BLAKE3 = "blake3"
TENSOR_ALGORITHM = BLAKE3
"""In which algorithm tensors are hashed where no record asks for another."""

_CHECKSUM_SEED = secrets.randbits(64)

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


class Hash(Protocol):
    """A running digest."""

    def update(self, data: memoryview | bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


def new_hash(algorithm: str) -> Hash:
    """Begin a digest.

    Raises:
        CheckpointError: an algorithm that this version does not know.
    """
    if algorithm == BLAKE3:
        running: Hash = blake3()
        return running
    if algorithm == SHA256:
        return hashlib.sha256()
    raise CheckpointError(f"the digest algorithm {algorithm!r} is not known", "Upgrade neuronledger")


def new_checksum() -> Hash:
    """Begin a checksum, to be compared with others of this process only."""
    running: Hash = xxh3_128(seed=_CHECKSUM_SEED)
    return running


@dataclass(frozen=True)
class ExpectedContent:
    """The digest of bytes that are to be read back, and their checksum (`new_checksum`), both in hexadecimal."""

    digest: str
    checksum: str


@dataclass(frozen=True)
class FileDigest:
    """Digests of one weight file.

    Attributes:
        file: file name.
        size: size in bytes.
        sha256: SHA-256 of the whole file, in hexadecimal.
        tensors: digest of the bytes of each tensor in `TENSOR_ALGORITHM`, in hexadecimal, by tensor name.
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
    digests = {tensor.name: new_hash(TENSOR_ALGORITHM) for tensor in ordered}
    position, first = 0, 0
    # Hashing releases the interpreter lock, so the digest of the file runs beside those of the tensors.
    with ThreadPoolExecutor(max_workers=1) as pool:
        for chunk in _chunks(path, CHUNK_BYTES):
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
    whole = hashlib.sha256()
    for chunk in _chunks(path, PIECE_BYTES):
        whole.update(chunk)
    return whole.hexdigest()


def digest_tensor(directory: Path, tensor: StoredTensor, algorithm: str) -> str:
    """Digest of a tensor's bytes in a model's files, in hexadecimal; nothing else of the file is read.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    return _of_bytes(new_hash(algorithm), directory, tensor)


def has_content(directory: Path, tensor: StoredTensor, expected: ExpectedContent) -> bool:
    """Whether a tensor's bytes in a model's files have the expected checksum; nothing else of the file is read.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    return _of_bytes(new_checksum(), directory, tensor) == expected.checksum


def _of_bytes(running: Hash, directory: Path, tensor: StoredTensor) -> str:
    for piece in read_pieces(directory / tensor.file, tensor.begin, tensor.end):
        running.update(piece)
    return running.hexdigest()


def read_pieces(path: Path, begin: int, end: int, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
    """The bytes `begin` to `end` of a file in pieces, writable, each valid only until reading goes on or ends.

    Raises:
        CheckpointError: the file cannot be read, or ends early.
    """
    try:
        with path.open("rb", buffering=0) as file, borrowed(piece_bytes) as buffer:
            file.seek(begin)
            while begin < end:
                piece = buffer[: end - begin]
                read_exactly(file, piece, path)
                begin += len(piece)
                yield piece
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "Check that it exists and may be read"
        ) from error


def state_digest(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """One digest of a model's weights, independent of order and of how they are split over files.

    Args:
        tensors: tensor name -> (dtype, shape, digest of its bytes as `named_digest` writes it).

    Returns:
        SHA-256 of the canonical JSON `[[name, dtype, shape, digest], …]`, sorted by name, in hexadecimal.
    """
    rows = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode("ascii")).hexdigest()


def tree_digest(header: str, tensors: Iterable[tuple[str, str]]) -> str:
    """One digest of a safetensors file from those of its parts, so that only parts that changed are hashed again.

    Args:
        header: SHA-256 of the bytes before the first tensor.
        tensors: (name, digest as `named_digest` writes it) in any order. The header says where each lies, and the
            format leaves no byte outside of them.

    Returns:
        SHA-256 of the canonical JSON `[header, [name, digest], …]`, sorted by name, in hexadecimal.
    """
    parts = [header, *([name, digest] for name, digest in sorted(tensors))]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode("ascii")).hexdigest()


def named_digest(digest: str, algorithm: str) -> str:
    """A digest with its algorithm before it; a SHA-256 stands alone, as it did before there were others."""
    return digest if algorithm == SHA256 else f"{algorithm}:{digest}"


def tokenizer_digest(path: Path) -> str:
    """Digest of what decides which ids a text becomes: vocabulary, merges and added tokens.

    The chat template is left out, and so is how the file is laid out, which differs between library versions.

    Raises:
        CheckpointError: the directory has no tokenizer, or its files are damaged.
    """
    return TokenizerContent.read(path).digest


def _chunks(path: Path, chunk_bytes: int) -> Iterator[memoryview]:
    """Chunks of a file up to its end, each valid only until reading goes on or ends."""
    try:
        with path.open("rb", buffering=0) as file, borrowed(chunk_bytes) as buffer:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "Check that it exists and may be read"
        ) from error
