"""A lineage at its head, read once and held still while a use case works: models, weights, protection, files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from sqlalchemy.orm import Session
from torch import Tensor

from algorithms.weights import AdapterWeights, CheckpointWeights, open_weights
from governance.catalogue import weights_of
from governance.claimed_directions import ClaimedDirections, claims_on_directions
from governance.errors import InterruptedPatchError, WeightsChangedError
from governance.weight_state import FileState, TensorState, changed_files, require_unchanged
from governance.workspace import Workspace
from registry import claims, locks, queries
from registry.errors import RegistryBusyError
from registry.schema import Lineage, Model


@dataclass(frozen=True)
class ModelLocation:
    """Where a registered model lies."""

    name: str
    path: Path
    base_path: Path | None


@dataclass(frozen=True)
class Recorded:
    """What the registry holds of a working checkpoint: every followed file, and every tensor by name."""

    files: tuple[FileState, ...]
    tensors: Mapping[str, TensorState]

    @property
    def algorithms(self) -> dict[str, str]:
        """Tensor name → the algorithm of its digest."""
        return {name: tensor.digest_algorithm for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class LineageState:
    """A lineage as it stood when it was read.

    Attributes:
        subject, aligned, base: effective weights of the registered models.
        head: effective weights of the working checkpoint.
        protected: module name → (n) int64 ascending, the rows that applied patches claim.
        protectors: module name → (n) int64, the id of the patch that claims each.
        directions: the input directions that applied patches claim.
        patch_dimensions: patch id → name of its dimension.
        applied_dimensions: dimensions that applied patches were made for, in the order of these.
        applied: of an adapter, the artifacts of the applied patches in sequence order, from which it is composed.
        recorded: the working checkpoint as last recorded.
    """

    lineage_id: int
    name: str
    working: Path
    state_digest: str
    head_patch_id: int | None
    head_sequence: int | None
    locations: Mapping[str, ModelLocation]
    subject_digest: str
    parameters: int
    linear_parameters: int
    module_ids: Mapping[str, int]
    subject: CheckpointWeights | AdapterWeights
    aligned: CheckpointWeights | AdapterWeights
    base: CheckpointWeights | AdapterWeights
    head: CheckpointWeights | AdapterWeights
    protected: Mapping[str, Tensor]
    protectors: Mapping[str, Tensor]
    directions: ClaimedDirections
    patch_dimensions: Mapping[int, str]
    applied_dimensions: tuple[str, ...]
    applied: tuple[Path, ...]
    recorded: Recorded

    @property
    def is_adapter(self) -> bool:
        """Whether the subject is a LoRA adapter."""
        return isinstance(self.subject, AdapterWeights)

    def holders(self, module: str) -> dict[int, int]:
        """Row → id of the patch that claims it, of one module."""
        if module not in self.protected:
            return {}
        return dict(zip(self.protected[module].tolist(), self.protectors[module].tolist(), strict=True))

    def holding(self, module: str, rows: Tensor) -> dict[int, int]:
        """Id of each patch that claims any of `rows` (n) int64 → how many it claims."""
        if module not in self.protected:
            return {}
        found = self.protectors[module][torch.isin(self.protected[module], rows)]
        patches, counts = torch.unique(found, return_counts=True)
        return dict(zip(patches.tolist(), counts.tolist(), strict=True))


def read_lineage(workspace: Workspace, name: str) -> LineageState:
    """Read a lineage and check that its models and its working checkpoint are what was recorded.

    Raises:
        RecordNotFoundError: no lineage of that name.
        InterruptedPatchError: a patch was interrupted; `recover` comes first.
        WeightsChangedError: a file is not what was recorded.
    """
    with workspace.registry.read() as session:
        lineage = queries.get_lineage(session, name)
        require_settled(session, lineage)
        models = {"subject": lineage.subject, "aligned": lineage.aligned, "base": lineage.base}
        for model in models.values():
            require_unchanged(model)
            if model.base_model is not None:
                require_unchanged(model.base_model)
        with telling_writers_apart(workspace, name, lineage.state_digest):
            require_working_unchanged(lineage)
        identifiers = queries.module_ids(session, lineage.subject_id)
        protected, protectors = _protection(session, lineage, {number: name for name, number in identifiers.items()})
        return LineageState(
            lineage_id=lineage.id,
            name=lineage.name,
            working=Path(lineage.working_path),
            state_digest=lineage.state_digest,
            head_patch_id=lineage.head_patch_id,
            head_sequence=lineage.head.sequence if lineage.head else None,
            locations={role: location_of(model) for role, model in models.items()},
            subject_digest=lineage.subject.state_digest,
            parameters=lineage.subject.parameters,
            linear_parameters=lineage.subject.linear_parameters,
            module_ids=identifiers,
            subject=weights_of(lineage.subject),
            aligned=weights_of(lineage.aligned),
            base=weights_of(lineage.base),
            head=open_weights(Path(lineage.working_path), location_of(lineage.subject).base_path),
            protected=protected,
            protectors=protectors,
            directions=ClaimedDirections(workspace.store, claims_on_directions(session, lineage)),
            patch_dimensions={patch.id: patch.dimension.name for patch in queries.list_patches(session, lineage.id)},
            applied_dimensions=tuple(
                dict.fromkeys(patch.dimension.name for patch in queries.applied_patches(session, lineage.id))
            ),
            applied=applied_artifacts(workspace, session, lineage.id) if lineage.subject.kind == "adapter" else (),
            recorded=recorded_state(lineage),
        )


def recorded_state(lineage: Lineage) -> Recorded:
    """Return what the registry holds of a lineage's working checkpoint."""
    return Recorded(
        files=tuple(
            FileState(file.file, file.size, file.modified_ns, file.digest, file.digest_algorithm)
            for file in lineage.files
        ),
        tensors={
            tensor.name: TensorState(
                tensor.name,
                tuple(tensor.shape),
                tensor.dtype,
                tensor.file,
                tensor.digest,
                tensor.digest_algorithm,
            )
            for tensor in lineage.tensors
        },
    )


def applied_artifacts(workspace: Workspace, session: Session, lineage_id: int) -> tuple[Path, ...]:
    """Return the artifacts of the applied patches in sequence order, each checked against its digest."""
    patches = queries.applied_patches(session, lineage_id)
    return tuple(workspace.store.verify(patch.artifact_digest) for patch in patches if patch.artifact_digest)


def require_settled(session: Session, lineage: Lineage) -> None:
    """Refuse to go on beside a patch that is at work, or over one that was interrupted.

    Raises:
        LockedError: a process, which is named, is at work on the lineage.
        InterruptedPatchError: a patch was interrupted; it is named.
    """
    unfinished = queries.unfinished_patches(session, lineage.id)
    if not unfinished:
        return
    lock = locks.holder(session, lineage.id)
    if lock is not None and locks.liveness(lock) != "dead":
        raise locks.locked_error(lineage.name, lock)
    patch = unfinished[0]
    raise InterruptedPatchError(
        f"patch {patch.sequence} of lineage {lineage.name} is {patch.state}: it was interrupted",
        "run neuronledger recover",
    )


@contextmanager
def telling_writers_apart(workspace: Workspace, lineage_name: str, state_digest: str) -> Iterator[None]:
    """Where weights are not what was recorded because another patch is just being written, say that instead.

    Whether a lineage is settled is asked first, but somebody may begin right after the answer.

    Args:
        workspace: the registry.
        lineage_name: the lineage whose weights are checked inside.
        state_digest: its state when it was read.

    Raises:
        LockedError, InterruptedPatchError: as `require_settled`.
        RegistryBusyError: a patch was applied or reverted meanwhile.
        WeightsChangedError: neither explains it.
    """
    try:
        yield
    except WeightsChangedError:
        with workspace.registry.read() as session:
            lineage = queries.get_lineage(session, lineage_name)
            require_settled(session, lineage)
            if lineage.state_digest != state_digest:
                raise RegistryBusyError(f"lineage {lineage_name} changed while it was checked", "try again") from None
        raise


def require_working_unchanged(lineage: Lineage) -> None:
    """Refuse to work from a working checkpoint that something else wrote to.

    Raises:
        WeightsChangedError: naming the first file.
    """
    findings = changed_files(Path(lineage.working_path), lineage.files, algorithms=recorded_state(lineage).algorithms)
    if findings:
        raise WeightsChangedError(
            f"the working checkpoint of lineage {lineage.name} was changed outside the ledger: {findings[0]}",
            "run neuronledger audit verify --weights, then restore the file, or put the one in its place that "
            f"neuronledger audit replay {lineage.name} --output DIRECTORY rebuilds",
        )


def location_of(model: Model) -> ModelLocation:
    """Where a registered model lies, and the checkpoint under it when it is an adapter."""
    return ModelLocation(
        name=model.name,
        path=Path(model.path),
        base_path=Path(model.base_model.path) if model.base_model else None,
    )


def _protection(
    session: Session, lineage: Lineage, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows: dict[str, list[Tensor]] = {}
    patches: dict[str, list[Tensor]] = {}
    for claim in claims.claims(session, lineage.id):
        neurons = torch.frombuffer(claim.neurons, dtype=torch.int64)
        rows.setdefault(names[claim.module_id], []).append(neurons)
        patches.setdefault(names[claim.module_id], []).append(torch.full_like(neurons, claim.patch_id))
    protected: dict[str, Tensor] = {}
    protectors: dict[str, Tensor] = {}
    for name, parts in rows.items():
        protected[name], order = torch.cat(parts).sort()
        protectors[name] = torch.cat(patches[name])[order]
    return protected, protectors
