"""Importing: a patch that was exported elsewhere, applied to an identical subject by the protocol of every patch.

The artifact is made anew from the file and has the SHA-256 that it had there, so the store holds the very same
artifact. What is recorded beside it is that patch's provenance, and an identification without scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from algorithms.errors import MismatchError, NonFiniteError
from governance.direction_checks import first_conflict, unlike_head
from governance.dry_runs import rehearse
from governance.errors import PatchFileError, PlanError
from governance.gate_rules import RuleResult
from governance.lineage_state import LineageState, read_lineage
from governance.patch_artifact import ArtifactModule, PatchArtifact, open_artifact
from governance.patch_file import PatchFile, extract_artifact, open_patch_file
from governance.patch_records import PatchSummary
from governance.patching import submit_patch
from governance.planned_rows import artifact_module
from governance.planning import ChangePlan, ModulePlan, PreparedPatch, require_head, sealed
from governance.provenance import ModelOrigin, Origin, OriginSummary, Provenance, origin_summary
from governance.row_figures import ModuleOutcome, RowFigures
from governance.tensor_file import DTYPES
from governance.working_checkpoint import require_space
from governance.workspace import Workspace
from registry import claims, queries
from registry.bulk import insert_rows
from registry.errors import NeuronProtectedError, RecordNotFoundError
from registry.schema import Identification, IdentifiedNeuron, SafetyDimension

_ANOTHER_SUBJECT = "import it into a lineage of the subject that it was exported from"
_EXPORT_AGAIN = "export the patch again, or copy the file again"
_BLOCK_ENTRIES = 8 * 2**20


@dataclass(frozen=True)
class ImportSummary:
    """A dry run's answer: everything that importing the patch would change."""

    lineage: str
    dimension: str
    head: int | None
    origin: OriginSummary | None
    file_sha256: str
    artifact: str
    neurons_modified: int
    directions: int
    modules: int
    parameters_modified: int
    modified_share: float
    modified_linear_share: float
    bytes: int
    rows_unchanged: int
    policy: str | None = None
    gates: tuple[RuleResult, ...] = ()
    refused: bool = False
    approvals_needed: int = 0


def import_patch(
    workspace: Workspace,
    lineage_name: str,
    file: Path,
    *,
    dimension: str | None = None,
    sha256: str | None = None,
    reason: str = "",
) -> PatchSummary:
    """Judge an exported patch by the policy in force, apply it to a lineage, verify it, and protect its neurons.

    Args:
        workspace: where to record.
        lineage_name: a lineage whose subject has the very weights of the exported patch's subject.
        file: what `patch export` wrote.
        dimension: name of the dimension here; the exported patch's own when left out.
        sha256: what the SHA-256 of the file has to be, from a source that is trusted more than the file.
        reason: why, for the record.

    Raises:
        PatchFileError: the file is damaged, was changed, or contradicts itself.
        PlanError: it was made on rows that the head does not have, or would change what claimed directions do.
        MismatchError: the lineage's subject is another one.
        NeuronProtectedError: an applied patch of this lineage holds one of the rows.
        RecordNotFoundError: no lineage or dimension of that name.
        NeuronLedgerError: as `apply_patch`.
    """
    with (
        workspace.attempt("patch.import", "lineage", lineage_name),
        _prepared(workspace, lineage_name, file, dimension, sha256) as ready,
    ):
        return submit_patch(workspace, ready, reason)


def dry_run_import(
    workspace: Workspace, lineage_name: str, file: Path, *, dimension: str | None = None, sha256: str | None = None
) -> ImportSummary:
    """Check an exported patch whole, as importing it would, and keep nothing of it.

    Args and Raises: as `import_patch`.
    """
    with (
        workspace.attempt("patch.import", "lineage", lineage_name),
        _prepared(workspace, lineage_name, file, dimension, sha256) as ready,
    ):
        plan, origin = ready.plan, ready.origin
        decision = rehearse(workspace, ready)
        return ImportSummary(
            lineage=plan.lineage.name,
            dimension=plan.dimension,
            head=plan.lineage.head_sequence,
            origin=origin_summary(origin.provenance.record()) if origin else None,
            file_sha256=origin.file_sha256 if origin else "",
            artifact=origin.provenance.artifact if origin else "",
            neurons_modified=plan.neurons_modified,
            directions=plan.directions,
            modules=len(plan.touched),
            parameters_modified=plan.parameters_modified,
            modified_share=plan.parameters_modified / plan.lineage.parameters,
            modified_linear_share=plan.parameters_modified / plan.lineage.linear_parameters,
            bytes=plan.bytes,
            rows_unchanged=ready.rows_unchanged,
            policy=decision.policy.label if decision.policy else None,
            gates=decision.results,
            refused=not decision.passed,
            approvals_needed=decision.approvals_needed,
        )


@contextmanager
def _prepared(
    workspace: Workspace, lineage_name: str, file: Path, dimension: str | None, sha256: str | None
) -> Iterator[PreparedPatch]:
    """Check everything and make the artifact anew, under a temporary name in the store."""
    exported = open_patch_file(file)
    lineage = read_lineage(workspace, lineage_name)
    _require_subject(workspace, lineage, exported)
    dimension_id, dimension_name = _dimension(workspace, exported.provenance, dimension)
    require_space(workspace.store.directory, file.stat().st_size)
    with workspace.store.writer() as path:
        file_sha256 = extract_artifact(exported, path)
        if sha256 is not None and sha256.lower() != file_sha256:
            raise PatchFileError(
                f"{file} has the SHA-256 {file_sha256}, not the one that was asked for",
                "get the file from where the SHA-256 comes from",
            )
        with open_artifact(path) as artifact:
            modules = tuple(_module_plan(workspace, lineage, artifact, module) for module in artifact.modules)
            require_space(lineage.working, 2 * sum(module.bytes for module in modules) if lineage.is_adapter else 0)
            on_others = exported.provenance.digest_before != exported.provenance.subject.state_digest
            outcomes = tuple(
                _checked_rows(workspace, lineage, artifact, number, on_others=on_others)
                for number in range(len(modules))
            )
            _require_kept_actions(lineage, artifact)
        plan = ChangePlan(
            lineage=lineage,
            dimension=dimension_name,
            dimension_id=dimension_id,
            method=exported.provenance.method,
            recorded_settings=exported.provenance.identification.settings,
            settings_digest=exported.provenance.identification.settings_digest,
            modules=modules,
            neurons_selected=sum(len(module.rows) for module in modules if not module.directions),
            neurons_protected=0,
        )
        digest, expected = sealed(workspace, lineage, path, artifact.modules)
        with workspace.registry.read() as session:
            require_head(queries.get_lineage(session, lineage_name), lineage)
        origin = Origin(exported.provenance, file_sha256)
        identify = partial(_record_identification, workspace, plan, origin)
        yield PreparedPatch(plan, path, digest, outcomes, expected, identify, origin)


def _require_subject(workspace: Workspace, lineage: LineageState, exported: PatchFile) -> None:
    """The subject here, and the checkpoint under it if it is an adapter, is the exported patch's, bit for bit."""
    told: ModelOrigin | None = exported.provenance.subject
    with workspace.registry.read() as session:
        record = queries.get_lineage(session, lineage.name).subject
        own: ModelOrigin | None = ModelOrigin.of(record)
    while own is not None and told is not None:
        if own.kind != told.kind:
            raise MismatchError(
                f"{own.name} of lineage {lineage.name} is of the kind {own.kind}, and {exported.path} patches the "
                f"{told.kind} {told.name}",
                _ANOTHER_SUBJECT,
            )
        if own.state_digest != told.state_digest and own.digest_algorithms != told.digest_algorithms:
            raise MismatchError(
                f"{own.name} was registered with {' and '.join(own.digest_algorithms)} digests of its tensors, "
                f"{told.name} with {' and '.join(told.digest_algorithms)}, so they cannot be compared",
                "register the older of the two again with this version, and make a lineage of it",
            )
        if own.state_digest != told.state_digest:
            raise MismatchError(
                f"{own.name} of lineage {lineage.name} is not {told.name}, which {exported.path} was made for: its "
                f"weights have the digest {own.state_digest[:12]}…, not {told.state_digest[:12]}…",
                _ANOTHER_SUBJECT,
            )
        own, told = own.under, told.under


def _dimension(workspace: Workspace, provenance: Provenance, name: str | None) -> tuple[int, str]:
    with workspace.registry.read() as session:
        if name is not None:
            return queries.get_dimension(session, name).id, name
        own = provenance.dimension.name
        found = session.scalar(select(SafetyDimension.id).where(SafetyDimension.name == own))
        if found is None:
            raise RecordNotFoundError(
                f"the patch is for the dimension {own!r}, and this registry has none of that name",
                f"run neuronledger dimension register {own}, or name one that is here with --dimension NAME",
            )
        return found, own


def _module_plan(
    workspace: Workspace, lineage: LineageState, artifact: PatchArtifact, module: ArtifactModule
) -> ModulePlan:
    """Plan one module as the artifact has it, once the subject has it too and nobody protects its rows."""
    try:
        own = artifact_module(lineage, module.name, module.rows)
    except KeyError as error:
        raise MismatchError(
            f"the subject of lineage {lineage.name} has no rows of {module.name} to patch", _ANOTHER_SUBJECT
        ) from error
    told = replace(module, extension=0, directions=0, held=0, blocks=())
    differing = next((name for name, value in asdict(own).items() if value != asdict(told)[name]), None)
    if differing is not None:
        raise MismatchError(
            f"{module.name} of the subject of lineage {lineage.name} has {differing} {asdict(own)[differing]}, "
            f"and {asdict(told)[differing]} in the exported patch",
            _ANOTHER_SUBJECT,
        )
    if module.extension and not lineage.is_adapter:
        raise PatchFileError(f"{module.name} gains rows of lora_A, and the subject is no adapter", _EXPORT_AGAIN)
    rows = artifact.rows(module.name)
    out_features = lineage.subject.modules[module.name].out_features
    if not len(rows) or bool((rows.diff() <= 0).any()) or not 0 <= int(rows[0]) <= int(rows[-1]) < out_features:
        raise PatchFileError(f"the rows of {module.name} are not ascending rows of its {out_features}", _EXPORT_AGAIN)
    taken = rows[torch.isin(rows, lineage.protected.get(module.name, rows[:0]))]
    if len(taken):
        raise _protected(workspace, lineage, module.name, int(taken[0]))
    return ModulePlan(
        module=module.name,
        module_id=lineage.module_ids[module.name],
        rows=rows,
        selected=len(rows),
        protected=0,
        parameters=len(rows) * module.in_features,
        bytes=len(rows) * module.width * DTYPES[module.dtype].itemsize,
        directions=module.directions,
    )


def _protected(workspace: Workspace, lineage: LineageState, module: str, row: int) -> NeuronProtectedError:
    with workspace.registry.read() as session:
        named = claims.protected_error(session, lineage.lineage_id, lineage.module_ids[module], row)
    return NeuronProtectedError(
        f"{named.problem} of lineage {lineage.name}", "revert that patch first, or import into a lineage of its own"
    )


def _checked_rows(
    workspace: Workspace, lineage: LineageState, artifact: PatchArtifact, number: int, *, on_others: bool
) -> ModuleOutcome:
    """The old rows are the head's, bit for bit, and the new ones are numbers."""
    workspace.progress("checking rows", number, len(artifact.modules))
    module = artifact.modules[number]
    rows, figures = artifact.rows(module.name), RowFigures(module.name)
    extension = artifact.extension(module.name)
    if extension is not None:
        _require_finite(extension, module.name)
    height = max(1, _BLOCK_ENTRIES // module.in_features)
    for first in range(0, module.rows, height):
        last = min(first + height, module.rows)
        old = artifact.values(module.name, "old", first, last)
        new = artifact.values(module.name, "new", first, last)
        differs = unlike_head(lineage, artifact, module, rows[first:last], old)
        if bool(differs.any()):
            on_others = on_others or module.name in lineage.directions
            raise _unlike(lineage, module, int(rows[first:last][differs][0]), on_others=on_others)
        _require_finite(new, module.name)
        figures.add(old, new)
    return figures.outcome()


def _unlike(lineage: LineageState, module: ArtifactModule, row: int, *, on_others: bool) -> PlanError | PatchFileError:
    if on_others:
        return PlanError(
            f"neuron {row} of {module.name} is not at the head of lineage {lineage.name} what it was where the patch "
            "was made: patches that claim directions wrote it there or here",
            "import it where the same patches are applied, in the same order",
        )
    return PatchFileError(
        f"neuron {row} of {module.name} is not the subject's in the exported patch, though its digest is", _EXPORT_AGAIN
    )


def _require_kept_actions(lineage: LineageState, artifact: PatchArtifact) -> None:
    conflict = first_conflict(lineage, artifact)
    if conflict is not None:
        raise PlanError(
            f"the exported patch cannot be applied to lineage {lineage.name}: {conflict}",
            "revert that patch first, or identify and apply here instead of importing",
        )


def _require_finite(values: torch.Tensor, module: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"a new row of {module} holds NaN or infinity", _EXPORT_AGAIN)


def _record_identification(workspace: Workspace, plan: ChangePlan, origin: Origin, session: Session) -> int:
    """Record how the neurons were found elsewhere: without artifact and scores, which stay there."""
    told = origin.provenance.identification
    record = Identification(
        lineage_id=plan.lineage.lineage_id,
        dimension_id=plan.dimension_id,
        method=plan.method,
        preset=told.preset,
        settings=told.settings,
        settings_digest=told.settings_digest,
        seed=told.seed,
        state_digest=told.state_digest,
        library_versions=told.library_versions,
        summary=told.summary(),
        created_at=workspace.clock(),
        actor=workspace.actor,
    )
    session.add(record)
    session.flush()
    for module in plan.touched:
        if module.directions:
            continue
        neurons = (
            {
                "identification_id": record.id,
                "module_id": module.module_id,
                "neuron": neuron,
                "score": None,
                "rank": None,
                "disposition": "selected",
                "protected_by": None,
            }
            for neuron in module.rows.tolist()
        )
        insert_rows(session, IdentifiedNeuron, neurons)
    workspace.record(
        session,
        "identification.imported",
        "lineage",
        plan.lineage.name,
        {
            "identification": record.id,
            "dimension": plan.dimension,
            "method": plan.method,
            "preset": told.preset,
            "settings_digest": told.settings_digest,
            "seed": told.seed,
            "state_digest": told.state_digest,
            "neurons_selected": plan.neurons_selected,
        },
        records=[record],
    )
    return record.id
