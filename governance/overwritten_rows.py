"""Rows that several patches wrote in turn, and why the earlier of them cannot be taken back first."""

import torch
from sqlalchemy.orm import Session

from governance.errors import PlanError
from governance.patch_artifact import open_artifact
from governance.workspace import Workspace
from registry import claims, queries
from registry.schema import Patch


def require_last_written(workspace: Workspace, session: Session, patch: Patch) -> None:
    """Refuse to take a patch back whose rows a later applied patch wrote too: their old bytes are not those to return.

    Raises:
        PlanError: names the later patches, the last of which has to be reverted first.
        ArtifactError: an artifact is missing or was changed.
        InputError: an artifact cannot be read.
    """
    directed = {claim.patch_id for claim in claims.protected_directions(session, patch.lineage_id)}
    later = [
        other
        for other in queries.applied_patches(session, patch.lineage_id)
        # Neurons are claimed once: rows are written in turn only where one of the two claims directions.
        if other.sequence > patch.sequence and {other.id, patch.id} & directed
    ]
    if not later:
        return
    store = workspace.store
    blocking: list[int] = []
    with open_artifact(store.verify(patch.artifact_digest or "")) as own:
        for other in later:
            with open_artifact(store.verify(other.artifact_digest or "")) as written:
                shared = [module.name for module in own.modules if written.module(module.name) is not None]
                if any(bool(torch.isin(own.rows(name), written.rows(name)).any()) for name in shared):
                    blocking.append(other.sequence)
    if blocking:
        names = ", ".join(map(str, blocking))
        by = f"patch {names}" if len(blocking) == 1 else f"patches {names}"
        raise PlanError(
            f"patch {patch.sequence} of lineage {patch.lineage.name} cannot be reverted: {by} wrote rows again that it "
            "had written, so its former bytes are no longer what has to return",
            f"revert patch {blocking[-1]} first",
        )
