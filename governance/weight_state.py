"""What a model's files and tensors are right now, as digests, and whether that is still what was recorded.

A file whose size and modification time are the recorded ones is taken as unchanged; anything else is hashed
again. `audit verify --weights` hashes everything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from algorithms.adapters import ADAPTER_CONFIG
from algorithms.architectures import coverage
from algorithms.checkpoints import StoredTensor, find_nonfinite, read_stored, require_finite
from algorithms.digests import digest_file, digest_weight_file, state_digest
from algorithms.weights import AdapterWeights, CheckpointWeights, tokenizer_content
from governance.errors import WeightsChangedError
from governance.workspace import Progress, no_progress
from registry.schema import Model


@dataclass(frozen=True)
class FileState:
    """One file: name relative to its model's directory, size in bytes, modification time and SHA-256."""

    file: str
    size: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class TensorState:
    """One tensor: where it is stored and the SHA-256 of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    sha256: str


@dataclass(frozen=True)
class WeightState:
    """A model's weights: sizes, and digests per file, per tensor and of the whole."""

    architecture: str
    parameters: int
    linear_parameters: int
    digest: str
    tokenizer_digest: str
    files: tuple[FileState, ...]
    tensors: tuple[TensorState, ...]


class RecordedFile(Protocol):
    """What the registry keeps of a file."""

    @property
    def file(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def modified_ns(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def measure_state(weights: CheckpointWeights | AdapterWeights, progress: Progress = no_progress) -> WeightState:
    """Hash every weight file of a model (and an adapter's configuration) in one reading pass.

    Raises:
        CheckpointError: a file cannot be read.
    """
    below = checkpoint_of(weights)
    stored = weight_tensors(weights)
    names = sorted({tensor.file for tensor in stored})
    files: list[FileState] = []
    tensors: list[TensorState] = []
    for done, file in enumerate(names):
        progress("hashing weights", done, len(names))
        state, contained = measure_file(weights.path, file, stored)
        files.append(state)
        tensors.extend(contained)
    progress("hashing weights", len(names), len(names))
    if isinstance(weights, AdapterWeights):
        files.append(measure_plain_file(weights.path, ADAPTER_CONFIG))
    extent = coverage(below.checkpoint, below.modules.values())
    return WeightState(
        architecture=str(below.checkpoint.config.get("model_type", "")),
        parameters=extent.total_parameters,
        linear_parameters=extent.linear_parameters,
        digest=digest_of(tensors, files),
        tokenizer_digest=tokenizer_content(weights).digest,
        files=tuple(files),
        tensors=tuple(tensors),
    )


def checkpoint_of(weights: CheckpointWeights | AdapterWeights) -> CheckpointWeights:
    """Return the full checkpoint of a model: itself, or the one under its adapter."""
    return weights.base if isinstance(weights, AdapterWeights) else weights


def weight_tensors(weights: CheckpointWeights | AdapterWeights) -> tuple[StoredTensor, ...]:
    """Return the tensors in a model's own files: the checkpoint's, or the adapter's factors."""
    source = weights.adapter if isinstance(weights, AdapterWeights) else weights.checkpoint
    return tuple(source.tensors.values())


def require_finite_weights(weights: CheckpointWeights | AdapterWeights) -> None:
    """Refuse a model whose own files hold NaN or infinity, from which a patch would spread them.

    Raises:
        NonFiniteError: naming the tensor.
    """
    if isinstance(weights, AdapterWeights):
        for stored in weights.adapter.tensors.values():
            require_finite(read_stored(weights.path, stored), stored.name, weights.path)
        return
    name = find_nonfinite(weights.checkpoint)
    if name is not None:
        require_finite(weights.checkpoint.read(name), name, weights.path)


def measure_file(
    directory: Path, file: str, tensors: Iterable[StoredTensor]
) -> tuple[FileState, tuple[TensorState, ...]]:
    """Hash one weight file and the tensors in it."""
    contained = sorted((tensor for tensor in tensors if tensor.file == file), key=lambda tensor: tensor.begin)
    status = (directory / file).stat()
    digests = digest_weight_file(directory / file, contained)
    return (
        FileState(file=file, size=digests.size, modified_ns=status.st_mtime_ns, sha256=digests.sha256),
        tuple(
            TensorState(name=t.name, shape=t.shape, dtype=t.dtype, file=file, sha256=digests.tensors[t.name])
            for t in contained
        ),
    )


def digest_of(tensors: Iterable[TensorState], files: Iterable[FileState]) -> str:
    """One digest of a model's weights: its tensors and, for an adapter, the configuration that scales them."""
    content = {tensor.name: (tensor.dtype, tuple(tensor.shape), tensor.sha256) for tensor in tensors}
    content.update({file.file: ("configuration", (), file.sha256) for file in files if file.file == ADAPTER_CONFIG})
    return state_digest(content)


def changed_files(directory: Path, recorded: Sequence[RecordedFile], *, always_hash: bool = False) -> list[str]:
    """Return a sentence for every recorded file that is missing or whose content is another."""
    findings = []
    for record in recorded:
        path = directory / record.file
        if not path.is_file():
            findings.append(f"{path} is missing")
            continue
        status = path.stat()
        if not always_hash and (status.st_size, status.st_mtime_ns) == (record.size, record.modified_ns):
            continue
        if status.st_size != record.size or digest_file(path) != record.sha256:
            findings.append(f"{path} does not have its recorded SHA-256 {record.sha256[:12]}…")
    return findings


def require_unchanged(model: Model) -> None:
    """Refuse to work from a model whose files are not those that were registered.

    Raises:
        WeightsChangedError: naming the first file.
    """
    findings = changed_files(Path(model.path), model.files)
    if findings:
        raise WeightsChangedError(
            f"model {model.name} is not what was registered: {findings[0]}",
            "restore the file, or register the changed model under another name",
        )


def measure_plain_file(directory: Path, file: str) -> FileState:
    """Hash one file that holds no tensors."""
    path = directory / file
    status = path.stat()
    return FileState(file=file, size=status.st_size, modified_ns=status.st_mtime_ns, sha256=digest_file(path))
