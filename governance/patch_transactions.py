"""The registry's side of a patch: one transaction for the intent, one for the result or for the return.

A patch that waits for approvals, or that its gates refused, is one transaction alone: nothing of it is written.
The transaction of the intent takes the lineage's lock, that of the result or of the return gives it back, so a lock is
held exactly while a patch is `applying` or `reverting`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy.orm import Session

from algorithms.digests import ExpectedContent
from governance.errors import PlanError
from governance.gates import Decision
from governance.lineage_history import applied_before
from governance.lineage_state import require_settled
from governance.patch_creation import direction_payload, record_patch
from governance.patch_records import PatchSummary, patch_summary
from governance.planned_patches import close_stale_plans, require_approved, require_planned
from governance.planning import PreparedPatch, require_head
from governance.policy_records import policy_in_force
from governance.working_files import FilesAfter, LineageFiles
from governance.workspace import Workspace
from registry import claims, locks, queries
from registry.errors import RegistryBusyError
from registry.record_digests import record_digests
from registry.schema import Lineage, Patch


@dataclass(frozen=True)
class IntendedRevert:
    """A revert that was checked and has not begun.

    Attributes:
        sequence: number of the patch.
        state_digest: the lineage's weights when it was checked.
        files: the lineage's working checkpoint, and the change that takes the patch back.
        expected: what `check_change` returned.
    """

    sequence: int
    state_digest: str
    files: LineageFiles
    expected: Mapping[str, ExpectedContent]


def begin_apply(
    workspace: Workspace, ready: PreparedPatch, artifact_digest: str, reason: str, token: str, decision: Decision
) -> int:
    """Record the intent to apply a patch, with what it was judged by, and take the lineage's lock.

    Returns:
        id of the patch.

    Raises:
        LockedError: another patch is at work.
        InterruptedPatchError: one was interrupted.
        RegistryBusyError: the head moved since the plan was made, or the policy changed since it was judged.
    """
    with workspace.registry.write() as session:
        lineage = _settled_head(session, ready)
        locks.acquire(session, lineage, token, "patch apply", workspace.actor, workspace.clock())
        return record_patch(workspace, session, ready, "applying", artifact_digest, reason, decision).id


def record_unwritten(
    workspace: Workspace,
    ready: PreparedPatch,
    state: Literal["planned", "rejected"],
    artifact_digest: str,
    reason: str,
    decision: Decision,
) -> PatchSummary:
    """Record a patch that is not written: it waits for approvals, or its gates refused it.

    Raises:
        LockedError, InterruptedPatchError, RegistryBusyError: as `begin_apply`.
    """
    with workspace.registry.write() as session:
        _settled_head(session, ready)
        return patch_summary(record_patch(workspace, session, ready, state, artifact_digest, reason, decision))


def begin_planned(workspace: Workspace, ready: PreparedPatch, sequence: int, token: str) -> int:
    """Record the intent to write a planned patch that was approved, and take the lineage's lock.

    Returns:
        id of the patch.

    Raises:
        ApprovalError: it is not planned, or lacks approvals.
        StalePlanError: the head moved, or the policy changed.
        LockedError, InterruptedPatchError, RegistryBusyError: as `begin_apply`.
    """
    with workspace.registry.write() as session:
        lineage = _settled_head(session, ready)
        patch = queries.get_patch(session, lineage, sequence)
        require_planned(session, patch)
        policy = policy_in_force(session, lineage.name)
        require_approved(patch, policy.file if policy else None)
        locks.acquire(session, lineage, token, "patch apply", workspace.actor, workspace.clock())
        before = record_digests(session, [patch])
        patch.state = "applying"
        workspace.record(
            session,
            "patch.applying",
            "lineage",
            lineage.name,
            {
                "patch": patch.sequence,
                "dimension": patch.dimension.name,
                "artifact": patch.artifact_digest or "",
                "digest_before": patch.digest_before,
                "neurons": patch.neurons_modified,
                "reason": patch.reason or "",
                "approved_by": [each.actor for each in patch.approvals if each.decision == "approved"],
            },
            records=[patch],
            before=before,
        )
        return patch.id


def _settled_head(session: Session, ready: PreparedPatch) -> Lineage:
    lineage = queries.get_lineage(session, ready.plan.lineage.name)
    require_settled(session, lineage)
    require_head(lineage, ready.plan.lineage)
    return lineage


def finish_apply(
    workspace: Workspace, ready: PreparedPatch, patch_id: int, after: FilesAfter, token: str
) -> PatchSummary:
    """Record that a patch is applied: claims, digests, head, result; and give the lock back.

    Raises:
        NeuronProtectedError: a neuron is claimed already.
        LockLostError: the lineage was recovered meanwhile.
    """
    plan = ready.plan
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        lineage = patch.lineage
        before = record_digests(session, [patch, lineage])
        locks.release(session, lineage.id, token)
        neurons = {module.module_id: module.rows.numpy().data for module in plan.touched if not module.directions}
        claims.claim(session, lineage.id, patch_id, neurons)
        directions = {module.module_id: module.directions for module in plan.touched if module.directions}
        claims.claim_directions(session, lineage.id, patch_id, directions)
        patch.state = "applied"
        patch.digest_after = after.digest
        patch.applied_at = workspace.clock()
        _record_files(session, lineage, after)
        lineage.head_patch_id = patch_id
        workspace.record(
            session,
            "patch.applied",
            "lineage",
            lineage.name,
            {
                "patch": patch.sequence,
                "dimension": plan.dimension,
                "artifact": patch.artifact_digest or "",
                "digest_before": patch.digest_before,
                "digest_after": after.digest,
                "neurons_selected": plan.neurons_selected,
                "neurons_already_protected": plan.neurons_protected,
                "neurons_modified": plan.neurons_modified,
                **direction_payload(plan.directions),
                "rows_unchanged": patch.rows_unchanged,
                "parameters_modified": plan.parameters_modified,
                "files": {file.file: file.digest for file in after.files if file.file in after.written},
                **(ready.origin.payload() if ready.origin else {}),
            },
            records=[patch, lineage],
            before=before,
        )
        close_stale_plans(workspace, session, lineage)
        return patch_summary(patch)


def revertible(session: Session, lineage_name: str, sequence: int | None) -> tuple[Lineage, Patch]:
    """Find the patch to revert.

    Raises:
        PlanError: there is none, or it is not applied.
        LockedError, InterruptedPatchError: another is at work, or was interrupted.
    """
    lineage = queries.get_lineage(session, lineage_name)
    require_settled(session, lineage)
    patch = lineage.head if sequence is None else queries.get_patch(session, lineage, sequence)
    if patch is None:
        raise PlanError(f"lineage {lineage_name} has no applied patch", "there is nothing to revert")
    if patch.state != "applied":
        raise PlanError(
            f"patch {patch.sequence} of lineage {lineage_name} is {patch.state}, not applied",
            "see patch list for the applied ones",
        )
    return lineage, patch


def begin_revert(workspace: Workspace, lineage_name: str, intended: IntendedRevert, reason: str, token: str) -> int:
    """Record the intent to revert a patch, and take the lineage's lock.

    Returns:
        id of the patch.

    Raises:
        RegistryBusyError: the lineage changed since it was checked.
        PlanError, LockedError, InterruptedPatchError: as `revertible`.
    """
    with workspace.registry.write() as session:
        lineage, patch = revertible(session, lineage_name, intended.sequence)
        if lineage.state_digest != intended.state_digest:
            raise RegistryBusyError(f"lineage {lineage_name} changed while it was checked", "revert the patch again")
        locks.acquire(session, lineage, token, "patch revert", workspace.actor, workspace.clock())
        before = record_digests(session, [patch])
        patch.state = "reverting"
        workspace.record(
            session,
            "patch.reverting",
            "lineage",
            lineage_name,
            {
                "patch": patch.sequence,
                "artifact": patch.artifact_digest or "",
                "digest_before": lineage.state_digest,
                "reason": reason,
            },
            records=[patch],
            before=before,
        )
        return patch.id


def finish_revert(workspace: Workspace, patch_id: int, after: FilesAfter, token: str) -> PatchSummary:
    """Record that a patch is reverted: claims released, digests, head, result; and give the lock back.

    Raises:
        LockLostError: the lineage was recovered meanwhile.
    """
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        lineage = patch.lineage
        before = record_digests(session, [patch, lineage])
        locks.release(session, lineage.id, token)
        patch.state = "reverted"
        patch.reverted_at = workspace.clock()
        directions = sum(
            claimed.rank for claimed in claims.protected_directions(session, lineage.id) if claimed.patch_id == patch_id
        )
        released = claims.release(session, patch_id)
        session.flush()
        applied = queries.applied_patches(session, lineage.id)
        lineage.head_patch_id = applied[-1].id if applied else None
        _record_files(session, lineage, after)
        workspace.record(
            session,
            "patch.reverted",
            "lineage",
            lineage.name,
            {
                "patch": patch.sequence,
                "digest_after": after.digest,
                "exact": after.digest == patch.digest_before if _stands_as_before(session, patch, applied) else None,
                "neurons_released": released,
                **direction_payload(directions),
                "files": {file.file: file.digest for file in after.files if file.file in after.written},
            },
            records=[patch, lineage],
            before=before,
        )
        close_stale_plans(workspace, session, lineage)
        return patch_summary(patch)


def return_apply(workspace: Workspace, patch_id: int, failure: str, after: FilesAfter, token: str) -> None:
    """Record that an apply was taken back, and give the lock back.

    Raises:
        LockLostError: the lineage was recovered meanwhile.
    """
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        before = record_digests(session, [patch, patch.lineage])
        patch.state = "rejected"
        patch.failure = failure
        _record_return(workspace, session, patch, "patch.undone", failure, after, before)
        locks.release(session, patch.lineage_id, token)


def return_revert(workspace: Workspace, patch_id: int, failure: str, after: FilesAfter, token: str) -> None:
    """Record that a revert was taken back, so that the patch stays applied.

    Raises:
        LockLostError: the lineage was recovered meanwhile.
    """
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        before = record_digests(session, [patch, patch.lineage])
        patch.state = "applied"
        _record_return(workspace, session, patch, "patch.revert-undone", failure, after, before)
        locks.release(session, patch.lineage_id, token)


def _record_return(
    workspace: Workspace,
    session: Session,
    patch: Patch,
    action: str,
    failure: str,
    after: FilesAfter,
    before: Mapping[str, str],
) -> None:
    """Record that a patch's rows are as they were before the attempt.

    Where other bytes are not what was recorded, something else wrote them: the files' record stays, and names them.
    """
    lineage = patch.lineage
    payload: dict[str, Any] = {"patch": patch.sequence, "failure": failure, "state_digest": lineage.state_digest}
    if after.digest == lineage.state_digest and not after.foreign_headers:
        _record_files(session, lineage, after)
    else:
        payload["found_digest"] = after.digest
        payload["foreign_headers"] = list(after.foreign_headers)
    workspace.record(session, action, "lineage", lineage.name, payload, records=[patch, lineage], before=before)


def _stands_as_before(session: Session, patch: Patch, applied: tuple[Patch, ...]) -> bool:
    """Whether the patches that are applied now are those that were when `patch` was, so that its digest must return."""
    then = applied_before(queries.list_patches(session, patch.lineage_id), patch)
    return {other.id for other in applied} == {other.id for other in then}


def _record_files(session: Session, lineage: Lineage, after: FilesAfter) -> None:
    files = queries.lineage_files(session, lineage.id)
    for file in after.files:
        if file.file not in after.written:
            continue  # its record may be newer than what the plan was made with
        record = files[file.file]
        record.size, record.modified_ns = file.size, file.modified_ns
        record.digest, record.digest_algorithm = file.digest, file.digest_algorithm
    tensors = queries.lineage_tensors(session, lineage.id)
    for tensor in after.tensors.values():
        held = tensors[tensor.name]
        held.shape, held.digest, held.digest_algorithm = list(tensor.shape), tensor.digest, tensor.digest_algorithm
    lineage.state_digest = after.digest
