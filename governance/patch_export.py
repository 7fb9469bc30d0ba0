"""Exporting: one patch as a file that another registry can import.

The file is written under a temporary name and flushed; then the ledger keeps its SHA-256, and only then it gets its
name. So there is no exported file that the ledger does not know of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from governance.errors import PatchFileError, PlanError
from governance.output_files import publish, require_free, temporary_beside
from governance.patch_artifact import PatchArtifact, open_artifact
from governance.patch_file import write_patch_file
from governance.provenance import Provenance
from governance.working_checkpoint import require_space
from governance.workspace import Workspace
from registry import claims, queries
from registry.schema import Patch


@dataclass(frozen=True)
class ExportSummary:
    """An exported patch: the file, and what is in it."""

    lineage: str
    patch: int
    dimension: str
    path: str
    sha256: str
    bytes: int
    artifact: str
    modules: int
    rows: int


def export_patch(
    workspace: Workspace, lineage_name: str, sequence: int, target: Path, *, force: bool = False
) -> ExportSummary:
    """Write one patch with its provenance as a file, and record that it was exported.

    Args:
        workspace: the registry.
        lineage_name: the lineage.
        sequence: number of the patch, applied or reverted.
        target: file to write.
        force: whether a file that is there may be replaced.

    Raises:
        RecordNotFoundError: no lineage or patch of that name.
        PlanError: the patch was never applied, or changes no row.
        InputError: the file is there already, or belongs to the registry or to a model.
        ArtifactError, PatchFileError: the artifact is damaged, or does not hold the rows that the patch claims.
        SpaceError: the file cannot be written.
    """
    with workspace.attempt("patch.export", "lineage", lineage_name):
        require_free(workspace, target, force=force)
        with workspace.registry.read() as session:
            patch = exportable_patch(workspace, session, lineage_name, sequence)
            provenance = Provenance.of(workspace, session, patch)
            modules, rows = len(patch.modules), sum(module.rows for module in patch.modules)
        artifact = workspace.store.path(provenance.artifact)
        size = artifact.stat().st_size
        require_space(target.parent, size + len(provenance.text()))
        with temporary_beside(target) as temporary:
            digest = write_patch_file(artifact, provenance, temporary)
            summary = ExportSummary(
                lineage=lineage_name,
                patch=sequence,
                dimension=provenance.dimension.name,
                path=str(target),
                sha256=digest,
                bytes=temporary.stat().st_size,
                artifact=provenance.artifact,
                modules=modules,
                rows=rows,
            )
            require_free(workspace, target, force=force)
            with workspace.registry.write() as session:
                record_export(workspace, session, provenance, target, {target.name: digest})
            publish(temporary, target)
        return summary


def exportable_patch(workspace: Workspace, session: Session, lineage_name: str, sequence: int) -> Patch:
    """Return a patch that was applied once, its artifact checked against its digest and its claims.

    Raises:
        PlanError: it was never applied, or is being written, or changes no row.
        ArtifactError: its artifact is missing or was changed.
        PatchFileError: its rows or settings are not those that the registry has of it.
    """
    lineage = queries.get_lineage(session, lineage_name)
    patch = queries.get_patch(session, lineage, sequence)
    if patch.state not in {"applied", "reverted"}:
        raise PlanError(
            f"patch {sequence} of lineage {lineage_name} is {patch.state}, neither applied nor reverted",
            "see patch list for patches that can be exported",
        )
    if not patch.modules:
        raise PlanError(
            f"patch {sequence} of lineage {lineage_name} changes no row", "export the patches that protect its neurons"
        )
    with open_artifact(workspace.store.verify(patch.artifact_digest or "")) as artifact:
        recorded = {held.module.name: held.rows for held in patch.modules}
        agree = recorded == {module.name: module.rows for module in artifact.modules}
        agree = agree and artifact.header.subject_digest == lineage.subject.state_digest
        if patch.state == "applied":
            agree = agree and _is_claimed(session, patch, artifact)
    if not agree or patch.settings != patch.identification.settings:
        what = "rows" if not agree else "settings"
        raise PatchFileError(
            f"the {what} that the registry has of patch {sequence} of lineage {lineage_name} are not those it was "
            "made with",
            "run neuronledger audit verify",
        )
    return patch


def record_export(
    workspace: Workspace, session: Session, provenance: Provenance, target: Path, files: Mapping[str, str]
) -> None:
    """Record in the ledger that a patch was exported, and the SHA-256 of each file that was written."""
    workspace.record(
        session,
        "patch.exported",
        "lineage",
        provenance.lineage,
        {
            "patch": provenance.patch,
            "dimension": provenance.dimension.name,
            "path": str(target.resolve()),
            "files": dict(files),
            "artifact": provenance.artifact,
        },
    )


def _is_claimed(session: Session, patch: Patch, artifact: PatchArtifact) -> bool:
    """Whether the patch protects the rows and the directions of its artifact, and no others."""
    names = {number: name for name, number in queries.module_ids(session, patch.lineage.subject_id).items()}
    held = {
        names[claim.module_id]: claim.neurons.tolist()
        for claim in claims.claims(session, patch.lineage_id)
        if claim.patch_id == patch.id
    }
    ranks = {
        names[claim.module_id]: claim.rank
        for claim in claims.protected_directions(session, patch.lineage_id)
        if claim.patch_id == patch.id
    }
    rows = {m.name: artifact.rows(m.name).tolist() for m in artifact.modules if not m.directions}
    return held == rows and ranks == {m.name: m.directions for m in artifact.modules if m.directions}
