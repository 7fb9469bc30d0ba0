"""Recovery: what a kill or a failing disk left halfway is brought to the version before or after.

A patch that was being applied is taken back; a revert that had begun is finished. Both read the artifact and nothing
else, so they can be interrupted and run again themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from algorithms.errors import CheckpointError
from governance import patch_transactions
from governance.errors import WeightsChangedError
from governance.lineage_state import recorded_state
from governance.patch_artifact import Side
from governance.working_checkpoint import remove_abandoned_copies
from governance.working_files import Change, FilesAfter, LineageFiles, bring_to, finish_change
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import locks, queries
from registry.schema import Patch


@dataclass(frozen=True)
class RecoveryAction:
    """What `recover` did with one interrupted patch."""

    lineage: str
    patch: int
    was: str
    now: str

    @property
    def sentence(self) -> str:
        """What was done, for people."""
        return f"Recovered: patch {self.patch} of {self.lineage} was {self.was} and is now {self.now}."


@dataclass(frozen=True)
class Recovery:
    """What recovery did, and what it could not do.

    Attributes:
        heads_completed: whether the ledger's head was missing from the head file.
    """

    actions: tuple[RecoveryAction, ...]
    failures: tuple[NeuronLedgerError | OSError, ...]
    heads_completed: bool


def recover(workspace: Workspace, *, foreign: bool = False) -> list[RecoveryAction]:
    """Bring every interrupted lineage to the version before or after, and clear away what killed writers left.

    One that cannot be recovered does not keep the others from it.

    Args:
        workspace: the registry.
        foreign: also recover what a process of another host holds, of which nothing can be known from here.

    Raises:
        LockedError: a process that lives, or one of another host, is at work on a lineage.
        WeightsChangedError: the files of one are still not what they should be afterwards.
    """
    recovery = recover_what_can_be(workspace, foreign=foreign)
    if recovery.failures:
        raise recovery.failures[0]
    return list(recovery.actions)


def recover_what_can_be(workspace: Workspace, *, foreign: bool = False) -> Recovery:
    """As `recover`, but what could not be recovered is returned instead of raised."""
    actions: list[RecoveryAction] = []
    failures: list[NeuronLedgerError | OSError] = []
    for lineage, patch_id in _unfinished(workspace):
        try:
            with workspace.attempt("recover", "lineage", lineage):
                action = _recover(workspace, patch_id, foreign=foreign)
        except (NeuronLedgerError, OSError) as failure:
            failures.append(failure)
            continue
        if action is not None:
            actions.append(action)
    workspace.store.remove_abandoned()
    remove_abandoned_copies(workspace.directory / "lineages")
    completed = workspace.registry.complete_heads()
    return Recovery(tuple(actions), tuple(failures), completed)


def undo_apply(workspace: Workspace, patch_id: int, failure: str, token: str) -> None:
    """Take back what was written; a patch that was committed before the failure stays.

    Raises:
        WeightsChangedError: the files could not be brought back to what they were.
        LockLostError: another process recovered the lineage meanwhile.
    """
    # A writing session waits for a commit of which this process does not know how it ended.
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        if patch.state != "applying":
            return
        files = files_of(workspace, session, patch, "old")
        digest_before = patch.digest_before
    after = bring_to(digest_before, files)
    patch_transactions.return_apply(workspace, patch_id, failure, after, token)
    _require_digest(files, after, digest_before)


def settle_revert(workspace: Workspace, patch_id: int, token: str, failure: str | None) -> None:
    """Finish an interrupted revert; after a failure, put the patch back instead and leave it applied.

    Raises:
        WeightsChangedError: the files could not be brought to what they should be.
        LockLostError: another process recovered the lineage meanwhile.
    """
    with workspace.registry.read() as session:
        patch = session.get_one(Patch, patch_id)
        files = files_of(workspace, session, patch, "old" if failure is None else "new")
        digest_before = patch.lineage.state_digest
    if failure is None:
        try:
            after = finish_change(files)
        except WeightsChangedError as changed:
            settle_revert(workspace, patch_id, token, failure=str(changed))
            raise
        patch_transactions.finish_revert(workspace, patch_id, after, token)
        return
    after = bring_to(digest_before, files)
    patch_transactions.return_revert(workspace, patch_id, failure, after, token)
    _require_digest(files, after, digest_before)


def files_of(workspace: Workspace, session: Session, patch: Patch, side: Side) -> LineageFiles:
    """The working checkpoint of a patch's lineage, and the change that writes one side of the patch.

    Raises:
        ArtifactError: the artifact of this patch (of an adapter, of any applied one) is missing or changed.
    """
    lineage = patch.lineage
    own = workspace.store.verify(patch.artifact_digest or "")
    others = [other for other in queries.applied_patches(session, lineage.id) if other.id != patch.id]
    both = sorted([*others, patch], key=lambda held: held.sequence)
    recorded = others if patch.state == "applying" else both

    def artifacts(patches: Sequence[Patch]) -> tuple[Path, ...]:
        if lineage.subject.kind != "adapter":
            return ()
        return tuple(workspace.store.verify(held.artifact_digest or "") for held in patches)

    return LineageFiles(
        working=Path(lineage.working_path),
        subject=Path(lineage.subject.path),
        change=Change(own, side, artifacts(recorded), artifacts(both if side == "new" else others)),
        recorded=recorded_state(lineage),
    )


def _unfinished(workspace: Workspace) -> list[tuple[str, int]]:
    with workspace.registry.read() as session:
        return [(patch.lineage.name, patch.id) for patch in queries.unfinished_patches(session)]


def _recover(workspace: Workspace, patch_id: int, *, foreign: bool) -> RecoveryAction | None:
    with locks.at_work() as token:
        with workspace.registry.write() as session:
            patch = session.get_one(Patch, patch_id)
            if patch.state not in {"applying", "reverting"}:
                return None  # somebody else recovered it
            lineage, state = patch.lineage, patch.state
            now = workspace.clock()
            locks.take_over(session, lineage, token, "recover", workspace.actor, now, foreign=foreign)
            name, number = lineage.name, patch.sequence
        try:
            if state == "applying":
                undo_apply(workspace, patch_id, "interrupted before it was complete", token)
            else:
                settle_revert(workspace, patch_id, token, failure=None)
        except CheckpointError as error:
            raise WeightsChangedError(
                f"patch {number} of lineage {name} is {state}, and its files cannot be read: {error.problem}",
                f"run neuronledger audit replay {name} --output DIRECTORY, which rebuilds the working checkpoint, put "
                "the files in its place, then run neuronledger recover",
            ) from error
    with workspace.registry.read() as session:
        return RecoveryAction(name, number, state, session.get_one(Patch, patch_id).state)


def _require_digest(files: LineageFiles, after: FilesAfter, digest: str) -> None:
    if after.digest != digest or after.foreign_headers:
        raise WeightsChangedError(
            f"the working checkpoint {files.working} could not be brought back to its recorded state",
            "something else wrote there; run neuronledger audit verify --weights to see which tensors differ",
        )
