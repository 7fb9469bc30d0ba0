"""Lineages: a subject paired with its aligned and base models, and the working checkpoint that patches write to."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy.orm import Session

from algorithms.weights import require_pair
from governance.catalogue import require_name, weights_of
from governance.errors import InputError, WeightsChangedError
from governance.weight_state import FileState, require_unchanged
from governance.working_checkpoint import create_working_checkpoint, discard_working_checkpoint
from governance.workspace import Workspace
from registry import claims, queries
from registry.schema import (
    Lineage,
    LineageFile,
    LineageTensor,
    Model,
)


@dataclass(frozen=True)
class LineageSummary:
    """A lineage: its models, its working checkpoint, its head and what is protected."""

    name: str
    subject: str
    aligned: str
    base: str
    working_path: str
    head: int | None
    applied_patches: int
    protected_neurons: int
    state_digest: str
    created_at: datetime


def create_lineage(
    workspace: Workspace, name: str, *, subject: str, aligned: str, base: str, working: Path | None = None
) -> LineageSummary:
    """Pair a subject with its aligned and base models and make the working checkpoint that patches write to.

    Raises:
        RecordExistsError: the name is taken.
        MismatchError: the models differ in architecture, shapes or tokenizer.
        WeightsChangedError: a model's files are not what was registered.
        SpaceError: the working checkpoint does not fit on the disk or cannot be written.
    """
    require_name("lineage", name)
    with workspace.attempt("lineage.create", "lineage", name):
        with workspace.registry.read() as session:
            queries.require_absent(session, Lineage, name)
            records = {
                role: _model_with_role(session, model, role)
                for role, model in (("subject", subject), ("aligned", aligned), ("base", base))
            }
            for record in records.values():
                require_unchanged(record)
            sources = {role: weights_of(record) for role, record in records.items()}
            identifiers = {role: record.id for role, record in records.items()}
            state_digest = records["subject"].state_digest
            registered = {file.file: file.sha256 for file in records["subject"].files}
            tensors = [(t.name, t.shape, t.dtype, t.file, t.sha256) for t in records["subject"].tensors]
        for role in ("aligned", "base"):
            require_pair(sources["subject"], sources[role])
        target = (working or workspace.directory / "lineages" / name).expanduser().resolve()
        files = create_working_checkpoint(sources["subject"].path, target)
        try:
            _require_copied(target, files, registered)
            lineage = Lineage(
                name=name,
                subject_id=identifiers["subject"],
                aligned_id=identifiers["aligned"],
                base_id=identifiers["base"],
                working_path=str(target),
                state_digest=state_digest,
                created_at=workspace.clock(),
                actor=workspace.actor,
                files=[
                    LineageFile(file=file.file, size=file.size, modified_ns=file.modified_ns, sha256=file.sha256)
                    for file in files
                ],
                tensors=[
                    LineageTensor(name=tensor, shape=shape, dtype=dtype, file=file, sha256=sha256)
                    for tensor, shape, dtype, file, sha256 in tensors
                ],
            )
            with workspace.registry.write() as session:
                queries.require_absent(session, Lineage, name)
                session.add(lineage)
                session.flush()
                workspace.record(
                    session,
                    "lineage.created",
                    "lineage",
                    name,
                    {
                        "subject": subject,
                        "aligned": aligned,
                        "base": base,
                        "working_path": str(target),
                        "state_digest": state_digest,
                    },
                )
                return lineage_summary(session, lineage)
        except BaseException:
            if not _is_recorded(workspace, name):
                discard_working_checkpoint(target)
            raise


def _is_recorded(workspace: Workspace, lineage: str) -> bool:
    with workspace.registry.read() as session:
        return any(record.name == lineage for record in queries.list_lineages(session))


def list_lineages(workspace: Workspace) -> list[LineageSummary]:
    """Return the lineages in order of creation."""
    with workspace.registry.read() as session:
        return [lineage_summary(session, record) for record in queries.list_lineages(session)]


def lineage_summary(session: Session, record: Lineage) -> LineageSummary:
    """Describe one lineage."""
    return LineageSummary(
        name=record.name,
        subject=record.subject.name,
        aligned=record.aligned.name,
        base=record.base.name,
        working_path=record.working_path,
        head=record.head.sequence if record.head else None,
        applied_patches=len(queries.applied_patches(session, record.id)),
        protected_neurons=claims.protected_count(session, record.id),
        state_digest=record.state_digest,
        created_at=record.created_at,
    )


def _require_copied(target: Path, files: tuple[FileState, ...], registered: Mapping[str, str]) -> None:
    """The copy is of the files that were registered: a change that left size and time as they were shows here."""
    copied = {file.file: file.sha256 for file in files}
    for file, sha256 in registered.items():
        if copied.get(file) != sha256:
            raise WeightsChangedError(
                f"{file} of the subject is not what was registered: its copy in {target} has another SHA-256",
                "restore the file, or register the changed model under another name",
            )


def _model_with_role(session: Session, name: str, role: str) -> Model:
    record = queries.get_model(session, name)
    if record.role != role:
        raise InputError(
            f"model {name} is registered as {record.role}, not as {role}",
            f"name a model of role {role}, or register it again under another name with --role {role}",
        )
    return record
