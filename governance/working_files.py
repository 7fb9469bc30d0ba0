"""The files of a working checkpoint, brought to a set of applied patches: one interface for both kinds of subject.

A full checkpoint changes by rewriting rows in place. An adapter is composed anew from the subject and the artifacts
of all applied patches, and written whole.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from algorithms.checkpoints import Checkpoint
from algorithms.digests import digest_file
from algorithms.errors import AdapterError, CheckpointError
from governance.adapter_files import ComposedAdapter, compose_adapter, config_bytes, remove_unfinished, write_adapter
from governance.errors import SpaceError, WeightsChangedError
from governance.lineage_state import Recorded
from governance.patch_artifact import PatchArtifact, Side, open_artifact
from governance.row_files import TensorChange, tensor_changes, write_rows
from governance.tensor_file import tensor_bytes
from governance.weight_state import (
    FileState,
    TensorState,
    digest_of,
    measure_file,
    measure_plain_file,
)


@dataclass(frozen=True)
class FilesAfter:
    """The working checkpoint after a write, as read back from the disk.

    Attributes:
        files: every followed file.
        tensors: every tensor by name.
        digest: one digest of the weights.
        written: names of the files that were written.
    """

    files: tuple[FileState, ...]
    tensors: Mapping[str, TensorState]
    digest: str
    written: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One patch to apply (`new`) or to take back (`old`), and the artifacts applied once that is done."""

    artifact: Path
    side: Side
    applied_after: tuple[Path, ...]


def check_change(working: Path, change: Change, recorded: Recorded) -> None:
    """Refuse a change that `write_change` would refuse, before anything says that it began.

    Raises:
        WeightsChangedError: a tensor or file that would change is not what was recorded.
        SpaceError: a file that would be written is a link, shared with another path, or not writable.
    """
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            _require_recorded_files(working, recorded)
            files = {file.file for file in recorded.files}
        else:
            checkpoint = Checkpoint.open(working)
            files = {checkpoint.stored(module.tensor).file for module in artifact.modules}
        for file in sorted(files):
            _require_rewritable(working / file)
        if artifact.header.form == "checkpoint":
            _checked_changes(working, artifact, change.side, recorded)


def write_change(working: Path, subject: Path, change: Change, recorded: Recorded) -> FilesAfter:
    """Write a change to the working checkpoint and prove that nothing else changed.

    Args:
        working: directory of the working checkpoint.
        subject: directory of the subject (read for adapters).
        change: the patch and its direction.
        recorded: the state before the change.

    Raises:
        WeightsChangedError: a tensor is not what was recorded before the write, or not what it should be after it.
        OSError: a file cannot be written.
    """
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            return _write_adapter(working, subject, change, recorded)
        return _write_rows(working, artifact, change.side, recorded)


def restore_side(working: Path, subject: Path, change: Change) -> None:
    """Write a change without asking what the files are now: how an interrupted write is undone."""
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            with _composed(subject, change.applied_after) as (adapter, composed):
                write_adapter(composed, adapter, working)
        else:
            write_rows(Checkpoint.open(working), artifact, change.side)


def bring_to(digest: str, working: Path, subject: Path, change: Change, recorded: Recorded) -> FilesAfter:
    """Write a change back if the weights are not at `digest` anyway: what was never written needs no undoing."""
    remove_unfinished(working)
    try:
        after = measure_working(working, recorded)
    except (CheckpointError, AdapterError):
        after = None
    if after is None or after.digest != digest:
        restore_side(working, subject, change)
        after = measure_working(working, recorded)
    return after


def finish_change(working: Path, subject: Path, change: Change, recorded: Recorded) -> FilesAfter:
    """Write a change that was interrupted halfway, and prove that nothing else changed.

    Args and Raises: as `write_change`; a touched tensor may be anything between what was recorded and what it becomes.
    """
    with open_artifact(change.artifact) as artifact:
        if artifact.header.form == "adapter":
            return _rewrite_adapter(working, subject, change, recorded)
        checkpoint = Checkpoint.open(working)
        write_rows(checkpoint, artifact, change.side)
        back = tensor_changes(checkpoint, artifact, "old" if change.side == "new" else "new")
    for tensor, states in back.items():
        if states.after != recorded.tensors[tensor].sha256:
            raise _changed(working, tensor, "is not what was recorded")
    after = measure_working(working, recorded)
    expected = {name: state.sha256 for name, state in recorded.tensors.items()}
    _require_expected(working, after, expected | {tensor: states.before for tensor, states in back.items()})
    return after


def measure_working(working: Path, recorded: Recorded) -> FilesAfter:
    """Hash every followed file of a working checkpoint."""
    return _measured(working, recorded, tuple(file.file for file in recorded.files))


def _write_rows(working: Path, artifact: PatchArtifact, side: Side, recorded: Recorded) -> FilesAfter:
    changes = _checked_changes(working, artifact, side, recorded)
    expected = {name: state.sha256 for name, state in recorded.tensors.items()}
    expected.update({tensor: change.after for tensor, change in changes.items()})
    written = write_rows(Checkpoint.open(working), artifact, side)
    after = _measured(working, recorded, written)
    _require_expected(working, after, expected)
    return after


def _write_adapter(working: Path, subject: Path, change: Change, recorded: Recorded) -> FilesAfter:
    _require_recorded_files(working, recorded)
    return _rewrite_adapter(working, subject, change, recorded)


def _rewrite_adapter(working: Path, subject: Path, change: Change, recorded: Recorded) -> FilesAfter:
    with _composed(subject, change.applied_after) as (adapter, composed):
        expected = {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in composed.tensors.items()}
        write_adapter(composed, adapter, working)
        after = _measured(working, recorded, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        _require_expected(working, after, expected)
        config = next(file for file in after.files if file.file == ADAPTER_CONFIG)
        if config.sha256 != hashlib.sha256(config_bytes(composed, adapter)).hexdigest():
            raise _changed(working, ADAPTER_CONFIG, "was not written as intended")
    return after


def _checked_changes(
    working: Path, artifact: PatchArtifact, side: Side, recorded: Recorded
) -> Mapping[str, TensorChange]:
    changes = tensor_changes(Checkpoint.open(working), artifact, side)
    for tensor, change in changes.items():
        if change.before != recorded.tensors[tensor].sha256:
            raise _changed(working, tensor, "is not what was recorded")
    return changes


def _require_recorded_files(working: Path, recorded: Recorded) -> None:
    for file in recorded.files:
        if digest_file(working / file.file) != file.sha256:
            raise _changed(working, file.file, "is not what was recorded")


def _require_rewritable(path: Path) -> None:
    """A write through a link, or into a file that another path shares, would change more than the lineage's own."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
        how = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else f"is shared by {status.st_nlink} paths"
        raise SpaceError(f"{path} {how}", "replace it by a copy of its own (cp, then mv over it)")
    if not os.access(path, os.W_OK):
        raise SpaceError(f"{path} cannot be written", "mend its permissions")


@contextmanager
def _composed(subject: Path, artifacts: Sequence[Path]) -> Iterator[tuple[Adapter, ComposedAdapter]]:
    adapter = Adapter.open(subject)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_artifact(path)) for path in artifacts]
        yield adapter, compose_adapter(adapter, opened)


def _measured(working: Path, recorded: Recorded, written: tuple[str, ...]) -> FilesAfter:
    """Hash the written files again; the others keep what was recorded."""
    files = {file.file: file for file in recorded.files if file.file not in written}
    tensors = {name: tensor for name, tensor in recorded.tensors.items() if tensor.file not in written}
    stored = (Adapter.open(working) if (working / ADAPTER_CONFIG).exists() else Checkpoint.open(working)).tensors
    for file in written:
        if file == ADAPTER_CONFIG:
            files[file] = measure_plain_file(working, file)
            continue
        files[file], contained = measure_file(working, file, stored.values())
        tensors.update({tensor.name: tensor for tensor in contained})
    return FilesAfter(
        files=tuple(sorted(files.values(), key=lambda file: file.file)),
        tensors=tensors,
        digest=digest_of(tensors.values(), files.values()),
        written=written,
    )


def _require_expected(working: Path, after: FilesAfter, expected: Mapping[str, str]) -> None:
    for name in sorted(set(expected) | set(after.tensors)):
        found = after.tensors.get(name)
        if found is None or found.sha256 != expected.get(name):
            raise _changed(working, name, "does not have the digest that it should have after the write")


def _changed(working: Path, what: str, how: str) -> WeightsChangedError:
    return WeightsChangedError(
        f"{what} of the working checkpoint {working} {how}",
        "something else writes there; run neuronledger recover, then audit verify --weights",
    )
