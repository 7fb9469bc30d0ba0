"""Replaying: the head of a lineage rebuilt from its subject and the artifacts of its patches, as a byte copy.

No algorithm runs again and the working checkpoint is not a source: the rows of the artifacts are put into the subject's
bytes. What comes out must have the recorded digests, tensor by tensor and as a whole, and be what the working
checkpoint holds. Where a patch was interrupted, the recorded head is what was there before it. The same pass derives
what the weights were before and after each applied patch was written, and holds that against the digests that its
record keeps.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from algorithms.adapters import Adapter
from algorithms.checkpoints import Checkpoint
from governance.adapter_files import write_adapter
from governance.errors import InputError
from governance.head_files import adapter_head, require_fit
from governance.lineage_history import LineageHistory, read_history
from governance.output_files import require_elsewhere
from governance.patch_artifact import PatchArtifact, open_artifact
from governance.rebuilding import Rebuilding, State
from governance.row_files import write_rows
from governance.weight_differences import Difference
from governance.working_checkpoint import copied_checkpoint, disk_errors, move_into_place
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import locks, queries


@dataclass(frozen=True)
class ReplayedState:
    """One moment of a lineage of which a digest was recorded.

    Attributes:
        moment: `of the head`, or before or after which patch was applied.
        patches: the patches that were applied then.
        recorded: the digest that was recorded.
        rebuilt: the digest of what the subject and the artifacts of those patches give; None where an artifact of a
            patch that was reverted since cannot be read.
        agrees: whether the two are the same; None where there is none to compare.
    """

    moment: str
    patches: State
    recorded: str
    rebuilt: str | None
    agrees: bool | None


@dataclass(frozen=True)
class Replay:
    """What rebuilding a lineage's head gave.

    Attributes:
        lineage: its name.
        patches: the applied patches.
        digest: digest of the rebuilt head.
        tensors: how many tensors were rebuilt.
        bytes: how many bytes they have.
        states: the head, and before and after each applied patch.
        output: where the rebuilt checkpoint was written, if it was.
        findings: everything that does not agree.
        interrupted: number of the patch that was interrupted, of which the head is the state before it; None if none.
    """

    lineage: str
    patches: State
    digest: str
    tensors: int
    bytes: int
    states: tuple[ReplayedState, ...]
    output: Path | None
    findings: tuple[Difference, ...]
    interrupted: int | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def replay(workspace: Workspace, lineage: str, output: Path | None = None) -> Replay:
    """Rebuild the head of a lineage and hold it against the record and against the working checkpoint.

    Args:
        workspace: the registry.
        lineage: name of the lineage.
        output: an empty or new directory to write the rebuilt checkpoint to, also where the working checkpoint was if
            it is no longer there. It is written only if it is the recorded head, whatever has become of the working
            checkpoint, and also where a patch was interrupted.

    Raises:
        RecordNotFoundError: no lineage of that name.
        LockedError: a patch is at work.
        InterruptedPatchError: a patch was interrupted, and nothing is to be written.
        ArtifactError: the artifact of an applied patch is missing or was changed.
        CheckpointError, AdapterError: the subject cannot be read.
        InputError, SpaceError: the output cannot be written there.
    """
    history, interrupted = _recorded_head(workspace, lineage, settled=output is None)
    target = None if output is None else _usable(workspace, output, history)
    moments = _moments(history)
    with ExitStack() as stack:
        subject = (Adapter if history.is_adapter else Checkpoint).open(history.subject)
        artifacts = _open_artifacts(
            workspace, history, subject, {patch for _, _, state in moments for patch in state}, stack
        )
        derivable = {state for _, _, state in moments if artifacts.keys() >= set(state)}
        rebuilding = Rebuilding(workspace.progress, history, artifacts, derivable)
        copy = None if target is None else stack.enter_context(_written(subject, artifacts, rebuilding.head, target))
        if isinstance(subject, Adapter):
            rebuilding.rebuild_adapter(subject)
        else:
            rebuilding.rebuild_checkpoint(subject)
        states = tuple(
            _compared(moment, state, recorded, rebuilding.digest(state) if state in derivable else None)
            for moment, recorded, state in moments
        )
        trusted = rebuilding.is_recorded and states[0].agrees is True
        if copy is not None and target is not None and trusted:
            rebuilding.require_written(copy)
            move_into_place(copy, target)
    return Replay(
        lineage=lineage,
        patches=rebuilding.head,
        digest=rebuilding.digest(rebuilding.head),
        tensors=rebuilding.tensors,
        bytes=rebuilding.bytes,
        states=states,
        output=target if trusted else None,
        findings=(*rebuilding.findings, *_disagreements(states)),
        interrupted=interrupted,
    )


def _recorded_head(workspace: Workspace, name: str, *, settled: bool) -> tuple[LineageHistory, int | None]:
    """A lineage as it was before a patch that was interrupted, and that patch's number; None if there is none.

    Raises:
        RecordNotFoundError: no lineage of that name.
        LockedError: a patch is at work.
        InterruptedPatchError: a patch was interrupted, and a settled lineage is asked for.
    """
    history = read_history(workspace, name, settled=settled)
    if not history.unfinished:
        return history, None
    with workspace.registry.read() as session:
        lock = locks.holder(session, queries.lineage_id(session, name))
        if lock is not None and locks.liveness(lock) != "dead":
            raise locks.locked_error(name, lock)
    # A patch that is being reverted is part of the recorded head until it is recorded as reverted.
    patches = tuple(
        replace(patch, state="applied") if patch.state == "reverting" else patch for patch in history.patches
    )
    return replace(history, patches=patches), history.unfinished[0].sequence


def _usable(workspace: Workspace, output: Path, history: LineageHistory) -> Path:
    """The output as an absolute path.

    Raises:
        InputError: something is there already, or it belongs to the registry or to a model.
    """
    target = output.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty directory", "name an empty directory with --output")
    if target.exists() or target != history.working.resolve():
        require_elsewhere(workspace, target)
    return target


def _moments(history: LineageHistory) -> list[tuple[str, str, State]]:
    """What was recorded when: (moment, digest, the patches that were applied then), the head first."""
    moments = [("of the head", history.state_digest, tuple(patch.sequence for patch in history.applied))]
    for patch in history.applied:
        before = history.applied_before(patch)
        moments.append((f"before patch {patch.sequence}", patch.digest_before, before))
        moments.append((f"after patch {patch.sequence}", patch.digest_after or "", (*before, patch.sequence)))
    return moments


def _open_artifacts(
    workspace: Workspace, history: LineageHistory, subject: Checkpoint | Adapter, wanted: set[int], stack: ExitStack
) -> dict[int, PatchArtifact]:
    """Open the artifacts of the wanted patches, in sequence order; those of reverted patches only if they can be.

    Raises:
        ArtifactError, InputError: that of an applied patch is missing, was changed or is of another subject.
    """
    opened = {}
    for patch in history.patches:
        if patch.sequence not in wanted:
            continue
        try:
            artifact = stack.enter_context(open_artifact(workspace.store.verify(patch.artifact or "")))
            require_fit(subject, artifact, patch.sequence)
        except NeuronLedgerError:
            if patch.state == "applied":
                raise
        else:
            opened[patch.sequence] = artifact
    return opened


@contextmanager
def _written(
    subject: Checkpoint | Adapter, artifacts: dict[int, PatchArtifact], head: State, target: Path
) -> Iterator[Path]:
    """A copy of the subject beside `target`, brought to the head; removed at exit unless it was moved there."""
    with copied_checkpoint(subject.path, target) as copy:
        with disk_errors(target):
            if isinstance(subject, Adapter):
                composed = adapter_head(subject, {patch: artifacts[patch] for patch in head}).composed
                write_adapter(composed, subject, copy)
            else:
                for patch in head:
                    write_rows(Checkpoint.open(copy), artifacts[patch], "new")
        yield copy


def _compared(moment: str, state: State, recorded: str, rebuilt: str | None) -> ReplayedState:
    return ReplayedState(moment, state, recorded, rebuilt, None if rebuilt is None else rebuilt == recorded)


def _disagreements(states: tuple[ReplayedState, ...]) -> Iterator[Difference]:
    for state in states:
        if state.agrees is False:
            with_patches = f"patches {', '.join(map(str, state.patches))}" if state.patches else "no patch"
            problem = f"the digest recorded {state.moment} is not that of the subject with {with_patches}"
            yield Difference("history", problem)
