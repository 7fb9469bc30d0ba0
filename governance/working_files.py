"""The files of a working checkpoint, brought to a set of applied patches: one interface for both kinds of subject.

A full checkpoint changes by rewriting rows in place. An adapter is composed anew from the subject and the artifacts
of all applied patches, and written whole.
"""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from algorithms.checkpoints import Checkpoint
from algorithms.digests import ExpectedContent, new_hash
from algorithms.errors import AdapterError, CheckpointError
from algorithms.safetensors_files import SafetensorsHeader, StoredTensor, read_header
from governance.adapter_files import (
    ComposedAdapter,
    compose_adapter,
    config_bytes,
    remove_unfinished,
    rewrite_file,
    write_adapter,
)
from governance.errors import SpaceError, WeightsChangedError
from governance.lineage_state import Recorded
from governance.patch_artifact import ArtifactModule, Side, open_artifact
from governance.row_files import shared_error, tensor_changes, write_rows, writing_rows
from governance.tensor_file import tensor_bytes
from governance.weight_state import (
    TREE,
    FileState,
    TensorState,
    digest_of,
    measure_plain_file,
    measure_tensors,
    tree_of,
    tree_state,
)


@dataclass(frozen=True)
class FilesAfter:
    """The working checkpoint after a write, as read back from the disk.

    Attributes:
        files: every followed file.
        tensors: every tensor by name.
        digest: one digest of the weights.
        written: names of the files that were written.
        foreign_headers: names of those of which other bytes stand before the first tensor than were recorded. The
            digests of tensors do not cover them.
    """

    files: tuple[FileState, ...]
    tensors: Mapping[str, TensorState]
    digest: str
    written: tuple[str, ...]
    foreign_headers: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One patch to apply (`new`) or to take back (`old`).

    Attributes:
        artifact: of the patch.
        side: which of its rows are written.
        applied: of an adapter, the artifacts of the patches that it was recorded with, in sequence.
        applied_after: of an adapter, those that it is composed of once the change is written.
    """

    artifact: Path
    side: Side
    applied: tuple[Path, ...] = ()
    applied_after: tuple[Path, ...] = ()


@dataclass(frozen=True)
class LineageFiles:
    """A working checkpoint and a change to it.

    Attributes:
        working: directory of the working checkpoint.
        subject: directory of the subject (read for adapters).
        change: a patch and its direction.
        recorded: the working checkpoint before the change.
    """

    working: Path
    subject: Path
    change: Change
    recorded: Recorded

    @property
    def is_adapter(self) -> bool:
        """Whether the working checkpoint is a LoRA adapter."""
        with open_artifact(self.change.artifact) as artifact:
            return artifact.header.form == "adapter"


def check_change(
    files: LineageFiles, computed: Iterable[ArtifactModule] | None = None
) -> Mapping[str, ExpectedContent]:
    """Refuse a change that `write_change` would refuse, before anything says that it began.

    Args:
        files: the working checkpoint and the change.
        computed: as in `tensor_changes`, where rows are still being written to the artifact; all of it is taken.

    Returns:
        What each touched tensor of a full checkpoint will hold, by name; an adapter is composed anew instead.

    Raises:
        WeightsChangedError: a tensor or file that would change is not what was recorded, or the patch was computed from
            a subject that is not what it was made of.
        SpaceError: a file that would be written is a link, shared with another path, or not writable.
    """
    working, change, recorded = files.working, files.change, files.recorded
    require_writable(files)
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            deque(computed or (), maxlen=0)
            _require_recorded(working, _measured(working, recorded, _all_files(recorded)), recorded)
            return {}
        changes = tensor_changes(Checkpoint.open(working), artifact, change.side, recorded.algorithms, computed)
    for tensor, states in changes.items():
        if states.before != recorded.tensors[tensor].digest:
            raise _changed(working, tensor, "is not what was recorded")
        if not states.replaces:
            raise WeightsChangedError(
                f"rows of {tensor} of the working checkpoint {working} are not those that the patch would put back: "
                f"{files.subject} was changed",
                "run neuronledger audit verify --weights, restore the model that it names, then patch again",
            )
    return {tensor: states.after for tensor, states in changes.items()}


def require_writable(files: LineageFiles) -> None:
    """Refuse a change whose files may not be written to, or that would be composed of another subject.

    Raises:
        WeightsChangedError: the subject's adapter with the applied patches is not what was recorded.
        SpaceError: a file is a link, shared with another path, or not writable; or the directory is behind a link.
    """
    _require_own_place(files.working)
    for name in _files_of(files):
        _require_rewritable(files.working / name)
    if files.is_adapter:
        _require_composed(files, files.change.applied)


def write_change(files: LineageFiles, expected: Mapping[str, ExpectedContent]) -> FilesAfter:
    """Write a change to the working checkpoint and prove that nothing else changed.

    Args:
        files: the working checkpoint and the change.
        expected: what `check_change` returned of the same change.

    Raises:
        WeightsChangedError: after the write a tensor, touched or not, of a written file is not what it should be.
        OSError: a file cannot be written.
    """
    with open_artifact(files.change.artifact) as artifact:
        if artifact.header.form == "adapter":
            return _rewrite_adapter(files)
        with closing(writing_rows(Checkpoint.open(files.working), artifact, files.change.side)) as written:
            return _proved(files, written, expected)


def compose_in(directory: Path, files: LineageFiles) -> str:
    """Write the adapter that a change would leave into another directory; return the digest of its weights.

    Raises:
        OSError: a file cannot be written.
    """
    with _composed(files, files.change.applied_after) as (adapter, composed):
        write_adapter(composed, adapter, directory)
    return _measured(directory, files.recorded, (ADAPTER_WEIGHTS, ADAPTER_CONFIG)).digest


def restore_side(files: LineageFiles) -> None:
    """Write what was recorded back without asking what the files are now: how an interrupted write is undone.

    Raises:
        WeightsChangedError: an adapter's subject with the applied patches is not what was recorded.
        SpaceError: another path shares a file.
        OSError: a file is a link, or cannot be written.
    """
    with open_artifact(files.change.artifact) as artifact:
        if artifact.header.form == "adapter":
            _require_composed(files, files.change.applied_after)
            with _composed(files, files.change.applied_after) as (adapter, composed):
                write_adapter(composed, adapter, files.working)
        else:
            write_rows(Checkpoint.open(files.working), artifact, files.change.side)


def bring_to(digest: str, files: LineageFiles) -> FilesAfter:
    """Write a change back, also where the weights read as having `digest`: that may never have reached the disk.

    After a flush that failed, or a kill before one, memory holds what the disk does not.

    Raises:
        SpaceError: the directory is behind a link.
        WeightsChangedError, SpaceError, OSError: as `restore_side`.
    """
    _require_own_place(files.working)
    remove_unfinished(files.working)
    written = _files_of(files)
    if files.is_adapter and _reads_as(digest, files):
        for name in written:
            rewrite_file(files.working / name)
    else:
        restore_side(files)
    return _measured(files.working, files.recorded, written)


def _reads_as(digest: str, files: LineageFiles) -> bool:
    try:
        return _measured(files.working, files.recorded, _files_of(files)).digest == digest
    except (CheckpointError, AdapterError):
        return False


def finish_change(files: LineageFiles) -> FilesAfter:
    """Write a change that was interrupted halfway, and prove that nothing else changed.

    Args and Raises: as `write_change`; a touched tensor may be anything between what was recorded and what it becomes.
    """
    change, recorded = files.change, files.recorded
    _require_own_place(files.working)
    remove_unfinished(files.working)
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            return _rewrite_adapter(files)
        checkpoint = Checkpoint.open(files.working)
        written = write_rows(checkpoint, artifact, change.side)
        back = tensor_changes(checkpoint, artifact, "old" if change.side == "new" else "new", recorded.algorithms)
        again = tensor_changes(checkpoint, artifact, change.side, recorded.algorithms)
    for tensor, states in back.items():
        if states.after.digest != recorded.tensors[tensor].digest:
            raise _changed(files.working, tensor, "is not what was recorded")
        if states.before != again[tensor].after.digest:
            raise _changed(files.working, tensor, "was not written as intended")
    return _proved(files, written, {tensor: states.after for tensor, states in again.items()})


def measure_working(working: Path, recorded: Recorded) -> FilesAfter:
    """Hash every followed file of a working checkpoint, tensor by tensor."""
    return _measured(working, recorded, _all_files(recorded))


def _proved(files: LineageFiles, written: Iterable[str], expected: Mapping[str, ExpectedContent]) -> FilesAfter:
    """Read the written files back, each once it is given: touched tensors are as expected, all else as recorded."""
    after = _measured(files.working, files.recorded, written, expected)
    digests = {name: state.digest for name, state in files.recorded.tensors.items()}
    _require_expected(files.working, after, digests | {name: content.digest for name, content in expected.items()})
    for file in after.foreign_headers:
        raise _changed(files.working, f"the header of {file}", "is not what was recorded")
    return after


def _rewrite_adapter(files: LineageFiles) -> FilesAfter:
    working, recorded = files.working, files.recorded
    _require_composed(files, files.change.applied)
    with _composed(files, files.change.applied_after) as (adapter, composed):
        expected = {name: _digest_of(tensor, recorded.tensors[name]) for name, tensor in composed.tensors.items()}
        write_adapter(composed, adapter, working)
        after = _measured(working, recorded, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        _require_expected(working, after, expected)
        config = next(file for file in after.files if file.file == ADAPTER_CONFIG)
        if config.digest != hashlib.sha256(config_bytes(composed, adapter)).hexdigest():
            raise _changed(working, ADAPTER_CONFIG, "was not written as intended")
    return after


def _require_recorded(working: Path, found: FilesAfter, recorded: Recorded) -> None:
    known = {file.file: file for file in recorded.files}
    for file in found.files:
        if file.digest != known[file.file].digest and file.digest_algorithm == known[file.file].digest_algorithm:
            raise _changed(working, file.file, "is not what was recorded")
    for name, tensor in recorded.tensors.items():
        if name not in found.tensors or found.tensors[name].digest != tensor.digest:
            raise _changed(working, name, "is not what was recorded")


def _files_of(files: LineageFiles) -> tuple[str, ...]:
    """Names of the files that a change writes."""
    if files.is_adapter:
        return ADAPTER_WEIGHTS, ADAPTER_CONFIG
    with open_artifact(files.change.artifact) as artifact:
        return tuple(sorted({files.recorded.tensors[module.tensor].file for module in artifact.modules}))


def _all_files(recorded: Recorded) -> tuple[str, ...]:
    return tuple(file.file for file in recorded.files)


def _require_own_place(working: Path) -> None:
    """A write into a directory behind a link, such as one to the subject, would change something else."""
    place = working.resolve()
    if place != working:
        raise SpaceError(
            f"the working checkpoint {working} is behind a symbolic link, in {place}",
            "move the directory itself to where the link is",
        )


def _require_rewritable(path: Path) -> None:
    """A write through a link, or into a file that another path shares, would change more than the lineage's own."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise SpaceError(f"{path} is a symbolic link", "replace it by a copy of its own (cp, then mv over it)")
    if status.st_nlink > 1:
        raise shared_error(path, status.st_nlink)
    if not os.access(path, os.W_OK):
        raise SpaceError(f"{path} cannot be written", "mend its permissions")


@contextmanager
def _composed(files: LineageFiles, applied: Iterable[Path]) -> Iterator[tuple[Adapter, ComposedAdapter]]:
    adapter = Adapter.open(files.subject)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_artifact(path)) for path in applied]
        yield adapter, compose_adapter(adapter, opened)


def _require_composed(files: LineageFiles, applied: Iterable[Path]) -> None:
    """Refuse to compose an adapter of a subject that, with the patches it was recorded with, is no longer that.

    Raises:
        WeightsChangedError: naming the first tensor or file.
    """
    recorded = files.recorded
    with _composed(files, applied) as (adapter, composed):
        found = {name: _digest_of(tensor, recorded.tensors[name]) for name, tensor in composed.tensors.items()}
        found[ADAPTER_CONFIG] = hashlib.sha256(config_bytes(composed, adapter)).hexdigest()
    wanted = {name: tensor.digest for name, tensor in recorded.tensors.items()}
    wanted |= {file.file: file.digest for file in recorded.files if file.file == ADAPTER_CONFIG}
    wrong = next((name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)), None)
    if wrong is not None:
        raise WeightsChangedError(
            f"{wrong} of the adapter {files.subject} with its patches is not what was recorded: it was changed",
            "run neuronledger audit verify --weights, and restore the subject's files",
        )


def _digest_of(tensor: Tensor, recorded: TensorState) -> str:
    running = new_hash(recorded.digest_algorithm)
    running.update(tensor_bytes(tensor))
    return running.hexdigest()


def _measured(
    working: Path,
    recorded: Recorded,
    chosen: Iterable[str],
    expected: Mapping[str, ExpectedContent] = MappingProxyType({}),
) -> FilesAfter:
    """Hash the chosen files again, tensor by tensor, as far as they are not `expected`; the others keep their record.

    What gives the files may write them: a file is hashed by other threads as soon as it is given.
    """
    weight_files = {tensor.file for tensor in recorded.tensors.values()}
    headers: list[SafetensorsHeader] = []
    written: list[str] = []

    def stored() -> Iterator[StoredTensor]:
        for file in chosen:
            written.append(file)
            if file in weight_files:
                headers.append(read_header(working / file))
                yield from headers[-1].tensors.values()

    found = measure_tensors(working, stored(), recorded.algorithms, expected)
    files = {file.file: file for file in recorded.files if file.file not in written}
    tensors = {name: tensor for name, tensor in recorded.tensors.items() if tensor.file not in written}
    tensors.update({tensor.name: tensor for tensor in found})
    for header in headers:
        files[header.file] = tree_state(header, [tensor for tensor in found if tensor.file == header.file])
    for file in written:
        if file not in weight_files:
            files[file] = measure_plain_file(working, file)
    return FilesAfter(
        files=tuple(sorted(files.values(), key=lambda file: file.file)),
        tensors=tensors,
        digest=digest_of(tensors.values(), files.values()),
        written=tuple(written),
        foreign_headers=tuple(header.file for header in headers if not _has_recorded(header, recorded)),
    )


def _require_expected(working: Path, after: FilesAfter, expected: Mapping[str, str]) -> None:
    for name in sorted(set(expected) | set(after.tensors)):
        found = after.tensors.get(name)
        if found is None or found.digest != expected.get(name):
            raise _changed(working, name, "does not have the digest that it should have after the write")


def _has_recorded(header: SafetensorsHeader, recorded: Recorded) -> bool:
    """Whether a header is the recorded one; True where the record is of the whole file and does not tell."""
    record = next(file for file in recorded.files if file.file == header.file)
    tensors = [tensor for tensor in recorded.tensors.values() if tensor.file == header.file]
    return record.digest_algorithm != TREE or tree_of(header.sha256, tensors) == record.digest


def _changed(working: Path, what: str, how: str) -> WeightsChangedError:
    return WeightsChangedError(
        f"{what} of the working checkpoint {working} {how}",
        "something else writes there; run neuronledger recover, then audit verify --weights",
    )
