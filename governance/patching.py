"""Patching: apply a prepared patch and take one back, in the order that leaves no mixture.

1. the artifact with old and new bytes is committed to the store;
2. the registry says `applying` (or `reverting`) and the ledger holds the intent;
3. the rows are written in place and flushed;
4. every tensor of every written file is hashed: touched ones must have the digest worked out beforehand, all others
   the one that was recorded;
5. claims, state, digests and the result event are committed together, and the head moves.

Whatever fails after step 2 is undone from the artifact at once, or, after a kill, by `recover`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from governance.errors import PlanError, WeightsChangedError
from governance.lineage_state import Recorded, recorded_state, require_settled, require_working_unchanged
from governance.patch_artifact import Side
from governance.patch_records import PatchSummary, patch_summary
from governance.planning import PatchPlan, PreparedPatch, prepared, require_head
from governance.working_files import (
    Change,
    FilesAfter,
    bring_to,
    check_change,
    finish_change,
    write_change,
)
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import claims, queries
from registry.schema import Lineage, Patch, PatchModule


@dataclass(frozen=True)
class RecoveryAction:
    """What `recover` did with one interrupted patch."""

    lineage: str
    patch: int
    was: str
    now: str


def apply_patch(workspace: Workspace, plan: PatchPlan, reason: str = "") -> PatchSummary:
    """Write a planned patch, verify it, and protect its neurons.

    Raises:
        RegistryBusyError: the head moved since the plan was made, or another patch is at work.
        WeightsChangedError: a tensor is not what it should be; the write has been undone.
        NeuronLedgerError: as `prepared`.
    """
    with workspace.attempt("patch.apply", "lineage", plan.lineage.name), prepared(workspace, plan) as ready:
        artifact_digest = workspace.store.commit(ready.artifact)
        patch_id = _begin_apply(workspace, ready, artifact_digest, reason)
        change = Change(
            artifact=workspace.store.path(artifact_digest),
            side="new",
            applied_after=(*plan.lineage.applied, workspace.store.path(artifact_digest)),
        )
        try:
            after = write_change(
                plan.lineage.working,
                plan.lineage.locations["subject"].path,
                change,
                ready.expected,
                plan.lineage.recorded,
            )
            return _finish_apply(workspace, plan, patch_id, after)
        except (NeuronLedgerError, OSError) as failure:
            _undo_apply(workspace, patch_id, str(failure))
            raise


def revert_patch(
    workspace: Workspace, lineage_name: str, sequence: int | None = None, reason: str = ""
) -> PatchSummary:
    """Take an applied patch back exactly and release its neurons.

    Claims are disjoint rows, so any applied patch can be reverted, not only the last.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        sequence: number of the patch; the head when left out.
        reason: why, for the record.

    Raises:
        PlanError: the patch is not applied, or there is none.
        WeightsChangedError: the files are not what was recorded.
    """
    with workspace.attempt("patch.revert", "lineage", lineage_name):
        expected = _check_revert(workspace, lineage_name, sequence)
        patch_id, working, subject, change, recorded = _begin_revert(workspace, lineage_name, sequence, reason)
        try:
            after = write_change(working, subject, change, expected, recorded)
        except (NeuronLedgerError, OSError) as failure:
            _settle_revert(workspace, patch_id, failure=str(failure))
            raise
        return _finish_revert(workspace, patch_id, after)


def recover(workspace: Workspace) -> list[RecoveryAction]:
    """Undo what was interrupted: a patch that was being applied is taken back, a revert is finished.

    One that cannot be recovered does not keep the others from it.

    Raises:
        WeightsChangedError: the files of one are still not what they should be afterwards.
    """
    with workspace.registry.read() as session:
        unfinished = [(patch.id, patch.state, patch.lineage.name) for patch in queries.unfinished_patches(session)]
    actions: list[RecoveryAction] = []
    failures: list[NeuronLedgerError | OSError] = []
    for patch_id, state, name in unfinished:
        try:
            with workspace.attempt("recover", "lineage", name):
                _recover(workspace, patch_id, state)
        except (NeuronLedgerError, OSError) as failure:
            failures.append(failure)
            continue
        with workspace.registry.read() as session:
            patch = session.get_one(Patch, patch_id)
            actions.append(RecoveryAction(name, patch.sequence, state, patch.state))
    if failures:
        raise failures[0]
    return actions


def _recover(workspace: Workspace, patch_id: int, state: str) -> None:
    if state == "applying":
        _undo_apply(workspace, patch_id, "interrupted before it was complete")
    else:
        _settle_revert(workspace, patch_id, failure=None)


def _begin_apply(workspace: Workspace, ready: PreparedPatch, artifact_digest: str, reason: str) -> int:
    plan = ready.plan
    with workspace.registry.write() as session:
        lineage = queries.get_lineage(session, plan.lineage.name)
        require_settled(session, lineage)
        require_head(lineage, plan.lineage)
        patch = Patch(
            lineage_id=lineage.id,
            sequence=queries.next_sequence(session, lineage.id),
            identification_id=plan.identification_id,
            dimension_id=plan.dimension_id,
            kind="fgsn",
            state="applying",
            parent_patch_id=lineage.head_patch_id,
            digest_before=lineage.state_digest,
            artifact_digest=artifact_digest,
            parameters_modified=plan.parameters_modified,
            parameters_total=plan.lineage.parameters,
            linear_parameters_total=plan.lineage.linear_parameters,
            neurons_selected=plan.neurons_selected,
            neurons_protected=plan.neurons_protected,
            neurons_modified=plan.neurons_modified,
            rows_unchanged=ready.rows_unchanged,
            settings=plan.settings.model_dump(mode="json"),
            actor=workspace.actor,
            reason=reason,
            created_at=workspace.clock(),
        )
        session.add(patch)
        session.flush()
        planned = {module.module: module for module in plan.modules}
        for outcome in ready.outcomes:
            session.add(
                PatchModule(
                    patch_id=patch.id,
                    module_id=planned[outcome.module].module_id,
                    rows=outcome.rows,
                    rows_unchanged=outcome.rows_unchanged,
                    parameters=planned[outcome.module].parameters,
                    norm_before=outcome.norm_before,
                    norm_after=outcome.norm_after,
                    update_norms={"change": outcome.change_norm},
                )
            )
        workspace.record(
            session,
            "patch.applying",
            "lineage",
            lineage.name,
            {
                "patch": patch.sequence,
                "dimension": plan.dimension,
                "identification": plan.identification_id,
                "settings_digest": plan.settings_digest,
                "artifact": artifact_digest,
                "digest_before": lineage.state_digest,
                "neurons": plan.neurons_modified,
                "reason": reason,
            },
        )
        return patch.id


def _finish_apply(workspace: Workspace, plan: PatchPlan, patch_id: int, after: FilesAfter) -> PatchSummary:
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        lineage = patch.lineage
        claims.claim(session, lineage.id, patch_id, {module.module_id: module.rows.tolist() for module in plan.touched})
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
                "rows_unchanged": patch.rows_unchanged,
                "parameters_modified": plan.parameters_modified,
                "files": {file.file: file.digest for file in after.files if file.file in after.written},
            },
        )
        session.flush()
        return patch_summary(patch)


def _undo_apply(workspace: Workspace, patch_id: int, failure: str) -> None:
    """Take back what was written; a patch that was committed before the failure stays."""
    with workspace.registry.read() as session:
        patch = session.get_one(Patch, patch_id)
        if patch.state != "applying":
            return
        working, subject, recorded = _paths(patch.lineage)
        change = _change(workspace, session, patch, "old")
        digest_before = patch.digest_before
    after = bring_to(digest_before, working, subject, change, recorded)
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        patch.state = "rejected"
        patch.failure = failure
        _record_return(workspace, session, patch, "patch.undone", failure, after)
    _require_digest(working, after, digest_before)


def _check_revert(workspace: Workspace, lineage_name: str, sequence: int | None) -> Mapping[str, str]:
    """Refuse what reverting would refuse, while no lock is held and nothing says that it began."""
    with workspace.registry.read() as session:
        lineage, patch = _revertible(session, lineage_name, sequence)
        require_working_unchanged(lineage)
        working, _, recorded = _paths(lineage)
        change = _change(workspace, session, patch, "old")
    return check_change(working, change, recorded)


def _revertible(session: Session, lineage_name: str, sequence: int | None) -> tuple[Lineage, Patch]:
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


def _begin_revert(
    workspace: Workspace, lineage_name: str, sequence: int | None, reason: str
) -> tuple[int, Path, Path, Change, Recorded]:
    with workspace.registry.write() as session:
        lineage, patch = _revertible(session, lineage_name, sequence)
        change = _change(workspace, session, patch, "old")
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
        )
        working, subject, recorded = _paths(lineage)
        return patch.id, working, subject, change, recorded


def _settle_revert(workspace: Workspace, patch_id: int, failure: str | None) -> None:
    """Finish an interrupted revert; after a failure, put the patch back instead and leave it applied."""
    with workspace.registry.read() as session:
        patch = session.get_one(Patch, patch_id)
        working, subject, recorded = _paths(patch.lineage)
        change = _change(workspace, session, patch, "old" if failure is None else "new")
        digest_before = patch.lineage.state_digest
    if failure is None:
        try:
            after = finish_change(working, subject, change, recorded)
        except WeightsChangedError as changed:
            _settle_revert(workspace, patch_id, failure=str(changed))
            raise
        _finish_revert(workspace, patch_id, after)
        return
    after = bring_to(digest_before, working, subject, change, recorded)
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        patch.state = "applied"
        _record_return(workspace, session, patch, "patch.revert-undone", failure, after)
    _require_digest(working, after, digest_before)


def _finish_revert(workspace: Workspace, patch_id: int, after: FilesAfter) -> PatchSummary:
    with workspace.registry.write() as session:
        patch = session.get_one(Patch, patch_id)
        lineage = patch.lineage
        patch.state = "reverted"
        patch.reverted_at = workspace.clock()
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
                "files": {file.file: file.digest for file in after.files if file.file in after.written},
            },
        )
        session.flush()
        return patch_summary(patch)


def _stands_as_before(session: Session, patch: Patch, applied: tuple[Patch, ...]) -> bool:
    """Whether the patches that are applied now are those that were when `patch` was, so that its digest must return."""
    then = {
        other.id
        for other in queries.list_patches(session, patch.lineage_id)
        if other.sequence < patch.sequence
        and other.applied_at is not None
        and (other.reverted_at is None or (patch.applied_at is not None and other.reverted_at > patch.applied_at))
    }
    return {other.id for other in applied} == then


def _change(workspace: Workspace, session: Session, patch: Patch, side: Side) -> Change:
    """Describe writing one side of a patch, and what is applied once that is done."""
    own = workspace.store.verify(patch.artifact_digest or "")
    others = [other for other in queries.applied_patches(session, patch.lineage_id) if other.id != patch.id]
    kept = [*others, patch] if side == "new" else others
    kept.sort(key=lambda held: held.sequence)
    paths = tuple(workspace.store.path(held.artifact_digest or "") for held in kept)
    return Change(artifact=own, side=side, applied_after=paths)


def _paths(lineage: Lineage) -> tuple[Path, Path, Recorded]:
    return Path(lineage.working_path), Path(lineage.subject.path), recorded_state(lineage)


def _record_return(
    workspace: Workspace, session: Session, patch: Patch, action: str, failure: str, after: FilesAfter
) -> None:
    """Record that a patch's rows are as they were before the attempt.

    Where other bytes are not what was recorded, something else wrote them: the files' record stays, and names them.
    """
    lineage = patch.lineage
    payload: dict[str, Any] = {"patch": patch.sequence, "failure": failure, "state_digest": lineage.state_digest}
    if after.digest == lineage.state_digest:
        _record_files(session, lineage, after)
    else:
        payload["found_digest"] = after.digest
    workspace.record(session, action, "lineage", lineage.name, payload)


def _require_digest(working: Path, after: FilesAfter, digest: str) -> None:
    if after.digest != digest:
        raise WeightsChangedError(
            f"the working checkpoint {working} could not be brought back to its recorded state",
            "something else wrote there; run neuronledger audit verify --weights to see which tensors differ",
        )


def _record_files(session: Session, lineage: Lineage, after: FilesAfter) -> None:
    files = queries.lineage_files(session, lineage.id)
    for file in after.files:
        record = files[file.file]
        record.size, record.modified_ns = file.size, file.modified_ns
        record.digest, record.digest_algorithm = file.digest, file.digest_algorithm
    tensors = queries.lineage_tensors(session, lineage.id)
    for tensor in after.tensors.values():
        held = tensors[tensor.name]
        held.shape, held.digest, held.digest_algorithm = list(tensor.shape), tensor.digest, tensor.digest_algorithm
    lineage.state_digest = after.digest
