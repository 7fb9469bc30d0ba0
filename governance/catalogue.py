"""The catalogue: models and safety dimensions are registered, checked and listed here."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from algorithms.adapters import is_adapter
from algorithms.weights import AdapterWeights, CheckpointWeights, open_weights
from governance.errors import InputError, PromptSetError
from governance.hashing import HashJournal
from governance.prompt_set_records import prompt_set_record
from governance.prompt_sets import (
    PromptSet,
    PromptSource,
    parse_canonical,
    prompt_key,
    read_prompt_set,
    require_disjoint,
)
from governance.weight_state import WeightState, measure_state, require_finite_weights, require_unchanged
from governance.workspace import Workspace
from registry import queries
from registry.schema import (
    NAME_LENGTH,
    Model,
    ModelFile,
    ModelModule,
    ModelTensor,
    Purpose,
    Role,
    SafetyDimension,
)

WeightSources = CheckpointWeights | AdapterWeights


@dataclass(frozen=True)
class ModelSummary:
    """A registered model, as lists and `--json` show it."""

    name: str
    role: str
    kind: str
    path: str
    base: str | None
    architecture: str
    parameters: int
    linear_parameters: int
    modules: int
    neurons: int
    state_digest: str
    created_at: datetime
    actor: str


@dataclass(frozen=True)
class DimensionSummary:
    """A registered safety dimension with the sizes of its prompt sets by purpose."""

    name: str
    description: str
    prompts: dict[str, int]
    dropped: dict[str, int]
    digests: dict[str, str]
    created_at: datetime
    actor: str


def register_model(
    workspace: Workspace,
    name: str,
    path: Path,
    role: Role,
    base: str | None = None,
    *,
    made_from: Mapping[str, Any] | None = None,
) -> ModelSummary:
    """Check a checkpoint or a LoRA adapter and record it with the digest of every tensor and file.

    Args:
        workspace: where to record.
        name: unused name for the model.
        path: directory of safetensors files, or of a PEFT LoRA adapter.
        role: `base`, `aligned`, `subject` or `reference`.
        base: for an adapter, the name of the registered checkpoint that it adapts.
        made_from: of a model that was made here, the models and settings that it came from.

    Raises:
        RecordExistsError: the name is taken.
        NeuronLedgerError: the directory cannot be read safely or is of a kind that is not reached.
    """
    require_name("model", name)
    with workspace.attempt("model.register", "model", name):
        directory = path.expanduser().resolve()
        adapter = is_adapter(directory)
        with workspace.registry.read() as session:
            queries.require_absent(session, Model, name)
            base_record = _adapter_base(session, name, adapter, base)
            base_path = Path(base_record.path) if base_record else None
            base_id = base_record.id if base_record else None
            if base_record:
                require_unchanged(base_record)
        weights = open_weights(directory, base_path)
        require_finite_weights(weights)
        journal = HashJournal.of(workspace.directory, directory)
        state = measure_state(weights, workspace.progress, journal)
        record = _model_record(name, role, directory, base_id, weights, state)
        record.actor = workspace.actor
        record.created_at = workspace.clock()
        record.details = {"made_from": dict(made_from)} if made_from else {}
        with workspace.registry.write() as session:
            queries.require_absent(session, Model, name)
            session.add(record)
            workspace.record(
                session,
                "model.registered",
                "model",
                name,
                {
                    "role": role,
                    "kind": record.kind,
                    "path": str(directory),
                    "base": base,
                    "architecture": record.architecture,
                    "parameters": record.parameters,
                    "state_digest": record.state_digest,
                    "files": {file.file: file.digest for file in record.files},
                    **record.details,
                },
                records=[record],
            )
            summary = _model_summary(record, base)
        journal.discard()
        return summary


def list_models(workspace: Workspace) -> list[ModelSummary]:
    """Return the registered models in order of registration."""
    with workspace.registry.read() as session:
        records = queries.list_models(session)
        return [_model_summary(record, record.base_model.name if record.base_model else None) for record in records]


def register_dimension(
    workspace: Workspace,
    name: str,
    sources: Mapping[Purpose, PromptSource],
    description: str = "",
) -> DimensionSummary:
    """Read, check and record the prompt sets of a new safety dimension.

    The prompts are copied in canonical form into the artifact store, so a later identification reads exactly
    what was registered even when the source has changed or gone.

    Args:
        workspace: where to record.
        name: unused name for the dimension.
        sources: `harmful` and `benign` at least; `heldout` where harmfulness is to be measured.
        description: what the concern is, in words.

    Raises:
        RecordExistsError: the name is taken.
        PromptSetError: a set is missing, empty, repeated, or contradicts another.
    """
    require_name("dimension", name)
    with workspace.attempt("dimension.register", "dimension", name):
        for purpose in ("harmful", "benign"):
            if purpose not in sources:
                raise PromptSetError(f"dimension {name} has no {purpose} prompts", f"pass --{purpose} FILE")
        with workspace.registry.read() as session:
            queries.require_absent(session, SafetyDimension, name)
        sets = {purpose: read_prompt_set(source) for purpose, source in sources.items()}
        require_disjoint(list(sets.items()))
        digests = {purpose: workspace.store.put_bytes(prompt_set.canonical) for purpose, prompt_set in sets.items()}
        now = workspace.clock()
        record = SafetyDimension(name=name, description=description, created_at=now, actor=workspace.actor)
        for purpose, prompt_set in sets.items():
            record.prompt_sets.append(prompt_set_record(workspace, purpose, prompt_set, digests[purpose]))
        with workspace.registry.write() as session:
            queries.require_absent(session, SafetyDimension, name)
            _require_new_harm(workspace, session, sets["harmful"])
            session.add(record)
            summary = DimensionSummary(
                name=name,
                description=description,
                prompts={purpose: len(prompt_set.rows) for purpose, prompt_set in sets.items()},
                dropped={purpose: prompt_set.dropped for purpose, prompt_set in sets.items()},
                digests={str(purpose): digest for purpose, digest in digests.items()},
                created_at=now,
                actor=workspace.actor,
            )
            workspace.record(
                session,
                "dimension.registered",
                "dimension",
                name,
                {
                    "description": description,
                    "prompts": summary.prompts,
                    "digests": summary.digests,
                    "sources": {purpose: prompt_set.source.location for purpose, prompt_set in sets.items()},
                },
                records=[record, *record.prompt_sets],
            )
            return summary


def list_dimensions(workspace: Workspace) -> list[DimensionSummary]:
    """Return the registered dimensions in order of registration."""
    with workspace.registry.read() as session:
        records = queries.list_dimensions(session)
        return [
            DimensionSummary(
                name=record.name,
                description=record.description,
                prompts={prompt_set.purpose: prompt_set.rows for prompt_set in record.prompt_sets},
                dropped={
                    prompt_set.purpose: prompt_set.source_filter.get("dropped", 0) for prompt_set in record.prompt_sets
                },
                digests={prompt_set.purpose: prompt_set.digest for prompt_set in record.prompt_sets},
                created_at=record.created_at,
                actor=record.actor,
            )
            for record in records
        ]


def require_name(kind: str, name: str) -> None:
    """Refuse a name that no file, message or event could carry.

    Raises:
        InputError: empty, longer than 255 characters, with a slash or a character that cannot be printed.
    """
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable() or {"/", "\\"} & set(name) or name.startswith("."):
        raise InputError(
            f"{name[:60]!r} cannot name a {kind}",
            f"give 1 to {NAME_LENGTH} printable characters without slashes, the first of them no dot",
        )


def model_with_role(session: Session, name: str, role: str) -> Model:
    """The registered model of a name, which has to be in a role.

    Raises:
        RecordNotFoundError: no model of that name.
        InputError: it is registered in another role.
    """
    record = queries.get_model(session, name)
    if record.role != role:
        raise InputError(
            f"model {name} is registered as {record.role}, not as {role}",
            f"name a model of role {role}, or register it again under another name with --role {role}",
        )
    return record


def weights_of(model: Model) -> WeightSources:
    """Open the effective weights of a registered model."""
    return open_weights(Path(model.path), Path(model.base_model.path) if model.base_model else None)


def _adapter_base(session: Session, name: str, adapter: bool, base: str | None) -> Model | None:
    if not adapter:
        if base is not None:
            raise InputError(f"model {name} is a full checkpoint, not an adapter", "leave --base-model out")
        return None
    if base is None:
        raise InputError(
            f"model {name} is a LoRA adapter",
            "name the registered checkpoint that it adapts with --base-model NAME",
        )
    record = queries.get_model(session, base)
    if record.kind != "checkpoint":
        raise InputError(
            f"base model {base} is itself an adapter", "name the full checkpoint under it with --base-model"
        )
    return record


def _model_record(
    name: str, role: Role, directory: Path, base_id: int | None, weights: WeightSources, state: WeightState
) -> Model:
    modules = list(weights.modules.values())
    return Model(
        name=name,
        role=role,
        kind="adapter" if isinstance(weights, AdapterWeights) else "checkpoint",
        path=str(directory),
        base_model_id=base_id,
        architecture=state.architecture,
        parameters=state.parameters,
        linear_parameters=state.linear_parameters,
        state_digest=state.digest,
        tokenizer_digest=state.tokenizer_digest,
        files=[
            ModelFile(
                file=file.file,
                size=file.size,
                modified_ns=file.modified_ns,
                digest=file.digest,
                digest_algorithm=file.digest_algorithm,
            )
            for file in state.files
        ],
        tensors=[
            ModelTensor(
                name=t.name,
                shape=list(t.shape),
                dtype=t.dtype,
                file=t.file,
                digest=t.digest,
                digest_algorithm=t.digest_algorithm,
            )
            for t in state.tensors
        ],
        modules=[
            ModelModule(
                position=position,
                name=module.name,
                block=module.block,
                kind=module.kind,
                tensor=module.tensor,
                out_features=module.out_features,
                in_features=module.in_features,
                transposed=module.transposed,
                input_group=module.input_group,
            )
            for position, module in enumerate(modules)
        ],
    )


def _model_summary(record: Model, base: str | None) -> ModelSummary:
    return ModelSummary(
        name=record.name,
        role=record.role,
        kind=record.kind,
        path=record.path,
        base=base,
        architecture=record.architecture,
        parameters=record.parameters,
        linear_parameters=record.linear_parameters,
        modules=len(record.modules),
        neurons=sum(module.out_features for module in record.modules),
        state_digest=record.state_digest,
        created_at=record.created_at,
        actor=record.actor,
    )


def _require_new_harm(workspace: Workspace, session: Session, prompt_set: PromptSet) -> None:
    """A second dimension with the same harmful prompts, in whatever order, would be the first under another name."""
    wanted = prompt_set.keys().keys()
    for existing in queries.prompt_sets(session, purpose="harmful"):
        if existing.dimension is None or existing.rows != len(wanted) or not workspace.store.contains(existing.digest):
            continue
        rows = parse_canonical(workspace.store.read_bytes(existing.digest))
        if {prompt_key(row.prompt) for row in rows} == wanted:
            raise PromptSetError(
                f"the harmful prompts of {prompt_set.source.location} are those of dimension {existing.dimension.name}",
                "register other prompts, or use that dimension",
            )
