"""What a model's files and tensors are right now, as digests, and whether that is still what was recorded.

A file whose size and modification time are the recorded ones is taken as unchanged; anything else is hashed
again. `audit verify --weights` hashes everything.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from algorithms.adapters import ADAPTER_CONFIG
from algorithms.architectures import coverage
from algorithms.checkpoints import StoredTensor, find_nonfinite, read_stored, require_finite
from algorithms.digests import (
    SHA256,
    TENSOR_ALGORITHM,
    ExpectedContent,
    digest_file,
    digest_tensor,
    has_content,
    named_digest,
    state_digest,
    tree_digest,
)
from algorithms.errors import CheckpointError
from algorithms.parallel import in_parallel
from algorithms.safetensors_files import SafetensorsHeader, read_header
from algorithms.weights import AdapterWeights, CheckpointWeights, tokenizer_content
from governance.errors import WeightsChangedError
from governance.hashing import HashJournal, hash_files
from governance.workspace import Progress, no_progress
from registry.schema import Model

TREE = "tree"
"""Name of the algorithm of `algorithms.digests.tree_digest`."""


@dataclass(frozen=True)
class FileState:
    """One file: name relative to its model's directory, size in bytes, modification time and digest.

    The algorithm is `sha256`, or `tree`: made of the digests of the file's header and tensors (`tree_digest`), so that
    after a patch only what changed is hashed again.
    """

    file: str
    size: int
    modified_ns: int
    digest: str
    digest_algorithm: str = SHA256


@dataclass(frozen=True)
class TensorState:
    """One tensor: where it is stored and the digest of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    digest: str
    digest_algorithm: str = TENSOR_ALGORITHM


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
    def digest(self) -> str: ...
    @property
    def digest_algorithm(self) -> str: ...


def measure_state(
    weights: CheckpointWeights | AdapterWeights, progress: Progress = no_progress, journal: HashJournal | None = None
) -> WeightState:
    """Hash every weight file of a model (and an adapter's configuration), reading each byte once.

    Args:
        weights: the model.
        progress: told after each file.
        journal: where finished files are noted, so that hashing that was interrupted goes on.

    Raises:
        CheckpointError: a file cannot be read.
    """
    below = checkpoint_of(weights)
    files, tensors = measure_weight_files(weights.path, weight_tensors(weights), progress, journal)
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


def measure_weight_files(
    directory: Path,
    stored: Sequence[StoredTensor],
    progress: Progress = no_progress,
    journal: HashJournal | None = None,
) -> tuple[list[FileState], list[TensorState]]:
    """Hash the files that tensors lie in, whole (SHA-256) and tensor by tensor.

    Raises:
        CheckpointError: a file cannot be read.
    """
    names = sorted({tensor.file for tensor in stored})
    times = {file: (directory / file).stat().st_mtime_ns for file in names}
    digests = hash_files(directory, names, stored, progress, journal)
    files = [FileState(file, digests[file].size, times[file], digests[file].sha256) for file in names]
    ordered = sorted(stored, key=lambda tensor: (tensor.file, tensor.begin))
    return files, [TensorState(t.name, t.shape, t.dtype, t.file, digests[t.file].tensors[t.name]) for t in ordered]


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


def digest_of(tensors: Iterable[TensorState], files: Iterable[FileState]) -> str:
    """One digest of a model's weights: its tensors and, for an adapter, the configuration that scales them."""
    content = {
        tensor.name: (tensor.dtype, tuple(tensor.shape), named_digest(tensor.digest, tensor.digest_algorithm))
        for tensor in tensors
    }
    content.update({file.file: ("configuration", (), file.digest) for file in files if file.file == ADAPTER_CONFIG})
    return state_digest(content)


def changed_files(
    directory: Path,
    recorded: Iterable[RecordedFile],
    *,
    always_hash: bool = False,
    algorithms: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Return a sentence for every recorded file that is missing or whose content is another.

    Args:
        directory: where the files lie.
        recorded: what the registry holds of them.
        always_hash: also where size and modification time are as recorded.
        algorithms: tensor name → the algorithm that its recorded digest is in.
    """
    return changed_in([(directory, recorded)], always_hash=always_hash, algorithms=algorithms)[0]


def changed_in(
    places: Iterable[tuple[Path, Iterable[RecordedFile]]],
    *,
    always_hash: bool = False,
    algorithms: Mapping[str, str] = MappingProxyType({}),
) -> list[list[str]]:
    """As `changed_files`, of several directories at once, so that directories of one file each keep all cores busy.

    Returns:
        What was found in each directory.
    """

    def finding(followed: tuple[int, Path, RecordedFile]) -> str | None:
        _, directory, record = followed
        path = directory / record.file
        if not path.is_file():
            return f"{path} is missing"
        status = path.stat()
        if not always_hash and (status.st_size, status.st_mtime_ns) == (record.size, record.modified_ns):
            return None
        same = status.st_size == record.size
        same = same and _digest_of_file(path, record.digest_algorithm, algorithms) == record.digest
        return None if same else changed_file(directory, record)

    given = list(places)
    followed = [(place, directory, record) for place, (directory, recorded) in enumerate(given) for record in recorded]
    findings: list[list[str]] = [[] for _ in given]
    for (place, _, _), found in zip(followed, in_parallel(finding, followed), strict=True):
        if found is not None:
            findings[place].append(found)
    return findings


def changed_file(directory: Path, record: RecordedFile) -> str:
    """Return a sentence about a file whose content is another than was recorded."""
    return (
        f"{directory / record.file} does not have its recorded digest {record.digest[:12]}… ({record.digest_algorithm})"
    )


def _digest_of_file(path: Path, algorithm: str, algorithms: Mapping[str, str]) -> str | None:
    """A file's digest in an algorithm; None where the file is so damaged that it has none."""
    if algorithm != TREE:
        return digest_file(path)
    try:
        header = read_header(path)
        return tree_state(header, measure_tensors(path.parent, header.tensors.values(), algorithms)).digest
    except CheckpointError:
        return None


def measure_tensors(
    directory: Path,
    tensors: Iterable[StoredTensor],
    algorithms: Mapping[str, str],
    expected: Mapping[str, ExpectedContent] = MappingProxyType({}),
) -> tuple[TensorState, ...]:
    """Hash tensors of a model's files, several at a time, and nothing else of the files.

    Args:
        directory: where the files lie.
        tensors: what to hash, each begun as soon as it is there.
        algorithms: tensor name → the algorithm that its recorded digest is in.
        expected: tensor name → what it should hold, with the digest in that algorithm; one that has the checksum is not
            hashed.

    Raises:
        CheckpointError: a file cannot be read, or ends early.
    """

    def measured(tensor: StoredTensor) -> TensorState:
        algorithm = algorithms.get(tensor.name, TENSOR_ALGORITHM)
        known = expected.get(tensor.name)
        if known is not None and has_content(directory, tensor, known):
            digest = known.digest
        else:
            digest = digest_tensor(directory, tensor, algorithm)
        return TensorState(tensor.name, tensor.shape, tensor.dtype, tensor.file, digest, algorithm)

    return tuple(in_parallel(measured, tensors))


def tree_state(header: SafetensorsHeader, tensors: Iterable[TensorState]) -> FileState:
    """State of a safetensors file of which every tensor's digest was taken after the header had been read.

    Size and time are those of that moment, so that a write after it shows.
    """
    return FileState(header.file, header.size, header.modified_ns, tree_of(header.sha256, tensors), TREE)


def tree_of(header: str, tensors: Iterable[TensorState]) -> str:
    """`tree_digest` of a safetensors file whose header has this SHA-256 and whose tensors are these."""
    named = [(tensor.name, named_digest(tensor.digest, tensor.digest_algorithm)) for tensor in tensors]
    return tree_digest(header, named)


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
    return FileState(file=file, size=status.st_size, modified_ns=status.st_mtime_ns, digest=digest_file(path))
