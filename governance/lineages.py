"""Lineages: a subject paired with its aligned and base models, and the working checkpoint that patches write to."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy.orm import Session

from algorithms.safetensors_files import read_header
from algorithms.weights import AdapterWeights, CheckpointWeights, require_pair
from governance.catalogue import model_with_role, require_name, weights_of
from governance.errors import InputError, WeightsChangedError
from governance.weight_state import (
    FileState,
    TensorState,
    measure_plain_file,
    require_unchanged,
    tree_state,
)
from governance.working_checkpoint import (
    copied_checkpoint,
    discard_working_checkpoint,
    move_into_place,
    require_unused,
)
from governance.workspace import Workspace
from registry import claims, queries
from registry.schema import (
    Lineage,
    LineageFile,
    LineageTensor,
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
        InputError: a model or another lineage has the place of the working checkpoint, or a part of it.
        SpaceError: the working checkpoint does not fit on the disk or cannot be written.
    """
    require_name("lineage", name)
    with workspace.attempt("lineage.create", "lineage", name):
        with workspace.registry.read() as session:
            queries.require_absent(session, Lineage, name)
            records = {
                role: model_with_role(session, model, role)
                for role, model in (("subject", subject), ("aligned", aligned), ("base", base))
            }
            for record in records.values():
                require_unchanged(record)
            sources = {role: weights_of(record) for role, record in records.items()}
            identifiers = {role: record.id for role, record in records.items()}
            state_digest = records["subject"].state_digest
            registered = {file.file: file.digest for file in records["subject"].files}
            tensors = {
                t.name: TensorState(t.name, tuple(t.shape), t.dtype, t.file, t.digest, t.digest_algorithm)
                for t in records["subject"].tensors
            }
        for role in ("aligned", "base"):
            require_pair(sources["subject"], sources[role])
        target = (working or workspace.directory / "lineages" / name).expanduser().resolve()
        chosen = working is not None
        with workspace.registry.read() as session:
            _require_apart(session, target)
        if chosen:
            require_unused(target)
        copied: dict[str, FileState] = {}

        def measure(copy: Path, name: str) -> None:
            if name in registered or (name.endswith(".safetensors") and "/" not in name):
                copied[name] = measure_plain_file(copy, name)

        with copied_checkpoint(sources["subject"].path, target, _never_rewritten(sources["subject"]), measure) as copy:
            files = _followed(copy, copied, registered, tensors)
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
                    LineageFile(
                        file=file.file,
                        size=file.size,
                        modified_ns=file.modified_ns,
                        digest=file.digest,
                        digest_algorithm=file.digest_algorithm,
                    )
                    for file in files
                ],
                tensors=[
                    LineageTensor(
                        name=tensor.name,
                        shape=list(tensor.shape),
                        dtype=tensor.dtype,
                        file=tensor.file,
                        digest=tensor.digest,
                        digest_algorithm=tensor.digest_algorithm,
                    )
                    for tensor in tensors.values()
                ],
            )
            with workspace.registry.write() as session:
                queries.require_absent(session, Lineage, name)
                _require_apart(session, target)
                session.add(lineage)
                session.flush()
                if not chosen:
                    # Left by a creation that was killed before it was recorded: nobody else can be between renaming
                    # and recording, since writers of the registry are one at a time.
                    discard_working_checkpoint(target)
                move_into_place(copy, target)
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
                    records=[lineage],
                )
                return lineage_summary(session, lineage)


def _require_apart(session: Session, target: Path) -> None:
    """Refuse a place that a model or another lineage has, or that lies in theirs, or theirs in it.

    Raises:
        InputError: it is such a place.
    """
    taken = [(f"lineage {record.name}", record.working_path) for record in queries.list_lineages(session)]
    taken += [(f"model {record.name}", record.path) for record in queries.list_models(session)]
    for owner, path in taken:
        directory = Path(os.path.realpath(path))
        if directory.is_relative_to(target) or _lies_in(target, directory):
            raise InputError(
                f"the working checkpoint {target} and the directory {path} of {owner} would be in each other's way",
                "name a directory outside of it with --working",
            )


def _lies_in(target: Path, directory: Path) -> bool:
    """Whether a directory is part of another: a hidden one, such as that of a registry in a model's, is not."""
    return target.is_relative_to(directory) and not any(
        part.startswith(".") for part in target.relative_to(directory).parts
    )


def _never_rewritten(subject: CheckpointWeights | AdapterWeights) -> set[str]:
    """Weight files of a full checkpoint that hold no row of a linear module, such as those of embeddings alone."""
    if isinstance(subject, AdapterWeights):
        return set()
    reached = {subject.checkpoint.stored(module.tensor).file for module in subject.modules.values()}
    return set(subject.checkpoint.weight_files) - reached


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


def _followed(
    copy: Path, copied: Mapping[str, FileState], registered: Mapping[str, str], tensors: Mapping[str, TensorState]
) -> tuple[FileState, ...]:
    """State of every followed file of a copy, once it is known to be a copy of the files that were registered.

    Args:
        copy: the copy's directory.
        copied: its files as they were read back.
        registered: file → SHA-256.
        tensors: the subject's tensors as registered.

    Raises:
        WeightsChangedError: it is not; a change that left size and time as they were shows here.
    """
    for file, digest in registered.items():
        if file not in copied or copied[file].digest != digest:
            raise WeightsChangedError(
                f"{file} of the subject is not what was registered: its copy in {copy} has another SHA-256",
                "restore the file, or register the changed model under another name",
            )
    weight_files = {tensor.file for tensor in tensors.values()}
    headers = [read_header(copy / name) for name in sorted(weight_files)]
    trees = [tree_state(header, [tensors[name] for name in header.tensors]) for header in headers]
    return (*trees, *(copied[name] for name in sorted(copied.keys() - weight_files)))
