"""Approvals: a planned patch is approved or refused by others than its planner, and written once enough have approved.

What is written is what was approved: the artifact of that very digest, on the very head, under the same policy.
"""

from pathlib import Path

from governance import patch_transactions
from governance.errors import ApprovalError
from governance.lineage_state import LineageState, read_lineage, telling_writers_apart
from governance.patch_artifact import open_artifact
from governance.patch_records import PatchSummary, patch_summary
from governance.patching import write_patch
from governance.planned_patches import counted_approvals, require_approved, require_planned, same_actor
from governance.planning import ChangePlan, ModulePlan, PreparedPatch
from governance.policy_records import policy_in_force
from governance.tensor_file import DTYPES
from governance.told_records import event_payload
from governance.working_files import Change, LineageFiles, check_change
from governance.workspace import Workspace
from registry import ledger, queries
from registry.record_digests import record_digests
from registry.schema import Approval, LedgerEvent, Patch


def approve_patch(
    workspace: Workspace, lineage_name: str, sequence: int, *, refuse: bool = False, reason: str = ""
) -> PatchSummary:
    """Record a decision on a planned patch; one refusal rejects it for good.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        sequence: number of the patch.
        refuse: reject it. Its planner may, too.
        reason: why, for the record.

    Raises:
        ApprovalError: the patch is not planned, the actor planned it, or has decided already.
        StalePlanError: the head moved, or the policy changed.
        NotAllowedError: the policy in force does not let the actor.
        RecordNotFoundError: no such lineage or patch.
    """
    with workspace.attempt("patch.approve", "lineage", lineage_name), workspace.registry.write() as session:
        lineage = queries.get_lineage(session, lineage_name)
        patch = queries.get_patch(session, lineage, sequence)
        require_planned(session, patch)
        name = f"patch {sequence} of lineage {lineage_name}"
        if same_actor(workspace.actor, patch.actor) and not refuse:
            raise ApprovalError(
                f"{workspace.actor} planned {name}, and four eyes are asked for", "have another actor approve it"
            )
        if any(same_actor(workspace.actor, each.actor) for each in patch.approvals):
            raise ApprovalError(f"{workspace.actor} has decided on {name} already", "have another actor decide")
        before = record_digests(session, [patch])
        patch.approvals.append(
            Approval(
                patch_id=patch.id,
                actor=workspace.actor,
                decision="refused" if refuse else "approved",
                reason=reason,
                created_at=workspace.clock(),
            )
        )
        if refuse:
            patch.state = "rejected"
            patch.failure = f"refused by {workspace.actor}" + (f": {reason}" if reason else "")
        workspace.record(
            session,
            "patch.refused" if refuse else "patch.approved",
            "lineage",
            lineage_name,
            {
                "patch": sequence,
                "artifact": patch.artifact_digest or "",
                "approvals": counted_approvals(patch.actor, patch.approvals),
                "comment": reason,
            },
            records=[patch],
            before=before,
        )
        return patch_summary(patch)


def apply_planned(workspace: Workspace, lineage_name: str, sequence: int) -> PatchSummary:
    """Write a planned patch that was approved, verify it, and protect its neurons.

    Raises:
        ApprovalError: it is not planned, or lacks approvals.
        StalePlanError: the head moved, or the policy changed.
        ArtifactError: the artifact that was approved is missing or was changed.
        WeightsChangedError: the working checkpoint is not what was recorded, or did not become what was judged.
        NotAllowedError: the policy in force does not let the actor.
        NeuronLedgerError: as `apply_patch`.
    """
    with workspace.attempt("patch.apply", "lineage", lineage_name):
        _require_ready(workspace, lineage_name, sequence)
        lineage = read_lineage(workspace, lineage_name)
        ready, judged = _prepared_again(workspace, lineage, sequence)

        def begin(token: str) -> int:
            return patch_transactions.begin_planned(workspace, ready, sequence, token)

        return write_patch(workspace, ready, ready.artifact, begin, judged)


def _require_ready(workspace: Workspace, lineage_name: str, sequence: int) -> None:
    """Say at once what the transaction of the intent would refuse."""
    with workspace.registry.read() as session:
        patch = queries.get_patch(session, queries.get_lineage(session, lineage_name), sequence)
        require_planned(session, patch)
        policy = policy_in_force(session, lineage_name)
        require_approved(patch, policy.file if policy else None)


def _prepared_again(workspace: Workspace, lineage: LineageState, sequence: int) -> tuple[PreparedPatch, str | None]:
    """The patch as it was prepared when it was planned, from its record and its artifact; and the judged digest."""
    with workspace.registry.read() as session:
        patch = queries.get_patch(session, queries.get_lineage(session, lineage.name), sequence)
        where = [
            LedgerEvent.subject_kind == "lineage",
            LedgerEvent.subject_name == lineage.name,
            LedgerEvent.action == "patch.planned",
        ]
        told = [event_payload(event) for event in ledger.events(session, where=where)]
        planned = next((each for each in told if each.get("patch") == sequence), {})
        digest = patch.artifact_digest or ""
        path = workspace.store.verify(digest)
        plan = ChangePlan(
            lineage=lineage,
            dimension=patch.dimension.name,
            dimension_id=patch.dimension_id,
            method=patch.kind,
            recorded_settings=patch.settings,
            settings_digest=str(planned.get("settings_digest", "")),
            modules=_modules(lineage, patch, path),
            neurons_selected=patch.neurons_selected,
            neurons_protected=patch.neurons_protected,
        )
        identification = patch.identification_id
    change = Change(artifact=path, side="new", applied=lineage.applied)
    files = LineageFiles(lineage.working, lineage.locations["subject"].path, change, lineage.recorded)
    with telling_writers_apart(workspace, lineage.name, lineage.state_digest):
        expected = check_change(files)
    judged = planned.get("digest_judged")
    ready = PreparedPatch(plan, path, digest, (), expected, identify=lambda _: identification)
    return ready, judged if isinstance(judged, str) else None


def _modules(lineage: LineageState, patch: Patch, path: Path) -> tuple[ModulePlan, ...]:
    parameters = {each.module.name: each.parameters for each in patch.modules}
    with open_artifact(path) as artifact:
        return tuple(
            ModulePlan(
                module=module.name,
                module_id=lineage.module_ids[module.name],
                rows=artifact.rows(module.name).clone(),
                selected=module.rows,
                protected=0,
                parameters=parameters[module.name],
                bytes=module.rows * module.width * DTYPES[module.dtype].itemsize,
                directions=module.directions,
            )
            for module in artifact.modules
        )
