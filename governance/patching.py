"""Patching: judge, apply and take back a prepared patch, in the order that leaves no mixture.

Where a policy is in force, a patch is judged in memory first (`governance.gates`). One that its gates refuse is
recorded as `rejected`, one that needs approvals as `planned`, with its artifact; neither touches the working
checkpoint.

1. the artifact with old and new bytes is committed to the store;
2. the registry says `applying` (or `reverting`), the ledger holds the intent, and the lineage is locked;
3. the rows are written in place, file by file, and flushed;
4. every tensor of a file that is flushed is read back: touched ones must be what was worked out beforehand, all others
   what was recorded;
5. claims, state, digests and the result event are committed together, the head moves, and the lock is given back.

What fails after step 2 is undone from the artifact at once, or, after a kill, by `governance.recovery`.
"""

from collections.abc import Callable
from pathlib import Path

from governance import patch_transactions
from governance.errors import WeightsChangedError
from governance.gates import judge_patch
from governance.lineage_state import require_working_unchanged, telling_writers_apart
from governance.overwritten_rows import require_last_written
from governance.patch_records import PatchSummary
from governance.patch_transactions import IntendedRevert
from governance.planning import PatchPlan, PreparedPatch, prepared
from governance.recovery import files_of, settle_revert, undo_apply
from governance.working_files import Change, LineageFiles, check_change, require_writable, write_change
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import locks

_UNDONE = (NeuronLedgerError, OSError, MemoryError, RuntimeError)
"""What a write is undone for at once: refusals, a failing disk, and memory or threads that the system does not give."""


def apply_patch(workspace: Workspace, plan: PatchPlan, reason: str = "") -> PatchSummary:
    """Judge a planned patch by the policy in force, write it, verify it, and protect its neurons.

    Returns:
        The patch: `applied`; `rejected` if a gate refused it; `planned` if it waits for approvals. Of the last two
        nothing was written.

    Raises:
        RegistryBusyError: the head moved since the plan was made, or another patch is at work.
        WeightsChangedError: a tensor is not what it should be; the write has been undone.
        NotAllowedError: the policy in force does not let the actor.
        NeuronLedgerError: as `prepared` and `judge_patch`.
    """
    with workspace.attempt("patch.apply", "lineage", plan.lineage.name), prepared(workspace, plan) as ready:
        return submit_patch(workspace, ready, reason)


def submit_patch(workspace: Workspace, ready: PreparedPatch, reason: str = "") -> PatchSummary:
    """Judge a prepared patch, then write it, keep it for approval, or record its rejection.

    Returns and Raises: as `apply_patch`.
    """
    decision = judge_patch(workspace, ready)
    artifact_digest = ready.artifact_digest
    workspace.store.keep(ready.artifact, artifact_digest)
    if not decision.passed:
        return patch_transactions.record_unwritten(workspace, ready, "rejected", artifact_digest, reason, decision)
    if decision.approvals_needed:
        return patch_transactions.record_unwritten(workspace, ready, "planned", artifact_digest, reason, decision)

    def begin(token: str) -> int:
        return patch_transactions.begin_apply(workspace, ready, artifact_digest, reason, token, decision)

    return write_patch(workspace, ready, workspace.store.path(artifact_digest), begin, decision.judged)


def write_patch(
    workspace: Workspace, ready: PreparedPatch, artifact: Path, begin: Callable[[str], int], judged: str | None
) -> PatchSummary:
    """Take a prepared patch through the steps above.

    Args:
        workspace: where to record.
        ready: the patch.
        artifact: its artifact in the store.
        begin: given the token of a lock, records the intent and returns the id of the patch.
        judged: digest of the weights that gates judged; None if they measured nothing.

    Raises:
        RegistryBusyError: the head moved since the plan was made, or another patch is at work.
        WeightsChangedError: a tensor is not what it should be, or not what was judged; the write has been undone.
        OSError: a file cannot be written; the write has been undone.
    """
    lineage = ready.plan.lineage
    change = Change(artifact, "new", applied=lineage.applied, applied_after=(*lineage.applied, artifact))
    files = LineageFiles(lineage.working, lineage.locations["subject"].path, change, lineage.recorded)
    require_writable(files)  # again: gates may have taken hours since it was checked
    with locks.at_work() as token:
        patch_id = begin(token)
        try:
            after = write_change(files, ready.expected)
            _require_judged(judged, after.digest)
            return patch_transactions.finish_apply(workspace, ready, patch_id, after, token)
        except _UNDONE as failure:
            undo_apply(workspace, patch_id, str(failure) or repr(failure), token)
            raise


def _require_judged(judged: str | None, digest: str) -> None:
    if judged not in (None, digest):
        raise WeightsChangedError(
            f"the weights were judged with the digest {str(judged)[:16]}… and written with {digest[:16]}…",
            "run neuronledger audit verify --weights, then apply the patch again",
        )


def revert_patch(
    workspace: Workspace, lineage_name: str, sequence: int | None = None, reason: str = ""
) -> PatchSummary:
    """Take an applied patch back exactly and release its neurons.

    Claimed rows are disjoint, so any applied patch can be reverted, not only the last; but where directions are claimed
    rows are written in turn, and only the last patch that wrote a row can be taken back.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        sequence: number of the patch; the head when left out.
        reason: why, for the record.

    Raises:
        PlanError: the patch is not applied, or there is none, or a later one wrote a row that it wrote.
        RegistryBusyError: another patch is at work.
        WeightsChangedError: the files are not what was recorded.
    """
    with workspace.attempt("patch.revert", "lineage", lineage_name), locks.at_work() as token:
        intended = _checked_revert(workspace, lineage_name, sequence)
        patch_id = patch_transactions.begin_revert(workspace, lineage_name, intended, reason, token)
        try:
            after = write_change(intended.files, intended.expected)
        except _UNDONE as failure:
            settle_revert(workspace, patch_id, token, failure=str(failure) or repr(failure))
            raise
        return patch_transactions.finish_revert(workspace, patch_id, after, token)


def _checked_revert(workspace: Workspace, lineage_name: str, sequence: int | None) -> IntendedRevert:
    """Refuse what reverting would refuse, while no lock is held and nothing says that it began."""
    with workspace.registry.read() as session:
        lineage, patch = patch_transactions.revertible(session, lineage_name, sequence)
        digest, number = lineage.state_digest, patch.sequence
        with telling_writers_apart(workspace, lineage_name, digest):
            require_working_unchanged(lineage)
        require_last_written(workspace, session, patch)
        files = files_of(workspace, session, patch, "old")
    with telling_writers_apart(workspace, lineage_name, digest):
        return IntendedRevert(number, digest, files, check_change(files))
