"""Identification: find the neurons of a dimension in a lineage at its head, and record how they were found."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from sqlalchemy.orm import Session

from algorithms.editors import Selection, Settings
from algorithms.judges import RefusalDetector
from algorithms.methods import Found, FoundModule, method_of
from governance.errors import InputError, SpaceError
from governance.identification_runs import runner
from governance.lineage_state import LineageState, read_lineage
from governance.prompt_sets import PromptRow, parse_canonical
from governance.tensor_file import TensorFile
from governance.workspace import Workspace
from registry import ledger, queries
from registry.bulk import insert_rows
from registry.schema import Identification as IdentificationRecord
from registry.schema import IdentificationPromptSet, IdentifiedNeuron, LayerScore, SafetyDimension

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class IdentificationSummary:
    """One identification, as `identify` shows it.

    `ran` is where and in which number format the models ran, empty for float32 on the CPU. Layers, overlap, rank
    correlation and the losses of the safe answers are FGSN's; choices of modules, reference and safe answers NLSR's.
    """

    identification: int
    lineage: str
    dimension: str
    method: str
    preset: str | None
    settings: dict[str, Any]
    head: int | None
    neurons_selected: int
    neurons_already_protected: int
    benign_overlap: int
    directions: int
    selected_parameters: int
    linear_parameters: int
    overlap: float | None
    rank_correlation: float | None
    aligned_loss: float | None
    head_loss: float | None
    layers: tuple[dict[str, Any], ...]
    choices: tuple[dict[str, Any], ...]
    reference: dict[str, Any] | None
    safe_answers: dict[str, Any] | None
    unreached: tuple[str, ...]
    warnings: tuple[str, ...]
    ran: dict[str, Any]
    created_at: datetime
    reused: bool


def run_identification(
    workspace: Workspace,
    lineage_name: str,
    dimension_name: str,
    settings: Settings,
    preset: str | None = None,
    *,
    reuse: bool = False,
    judge: RefusalDetector | None = None,
) -> IdentificationSummary:
    """Identify the neurons of a dimension in a lineage at its head, and record them.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        dimension_name: the dimension, whose prompts calibrate.
        settings: every choice of the method; which method it is they say themselves.
        preset: name of the preset that the settings came from, for the record.
        reuse: return the newest identification with the same settings at the same head, if there is one, wherever and
            in whatever number format its models ran.
        judge: what tells safe answers from others where NLSR has to generate them; refusal phrases when left out.

    Raises:
        NeuronLedgerError: the lineage, the prompts or the settings cannot be used.
    """
    with workspace.attempt("identify", "lineage", lineage_name):
        digest = settings_digest(settings)
        with workspace.registry.read() as session:
            dimension = queries.get_dimension(session, dimension_name)
            lineage_record = queries.get_lineage(session, lineage_name)
            if reuse:
                held = queries.latest_identification(
                    session,
                    lineage_record.id,
                    dimension.id,
                    state_digest=lineage_record.state_digest,
                    settings_digest=digest,
                )
                if held is not None:
                    return _summary(held, reused=True)
            prompts, prompt_set_ids = _prompts(workspace, session, dimension, settings)
            dimension_id = dimension.id
        lineage = read_lineage(workspace, lineage_name)
        outcome = runner(settings, judge)(workspace, lineage, prompts)
        found, details = outcome.found, outcome.details
        if workspace.placement.record:
            details = {**details, "ran": workspace.placement.record}
        artifact = _store(workspace, found)
        record = IdentificationRecord(
            lineage_id=lineage.lineage_id,
            dimension_id=dimension_id,
            method=settings.method,
            preset=preset,
            settings=settings.model_dump(mode="json"),
            settings_digest=digest,
            seed=settings.seed,
            head_patch_id=lineage.head_patch_id,
            state_digest=lineage.state_digest,
            library_versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            summary={
                "found": found.summary(),
                "answers": outcome.answers,
                "counts": _counts(found, settings),
                "head_sequence": lineage.head_sequence,
                "warnings": list(settings.warnings()),
                **details,
            },
            artifact_digest=artifact,
            created_at=workspace.clock(),
            actor=workspace.actor,
        )
        with workspace.registry.write() as session:
            session.add(record)
            session.flush()
            _record_details(session, record.id, found, prompt_set_ids)
            if not settings.protects_directions:
                _record_neurons(session, record.id, found, lineage)
            record_event(workspace, session, record, details)
        with workspace.registry.read() as session:
            return _summary(session.get_one(IdentificationRecord, record.id), reused=False)


def record_event(
    workspace: Workspace,
    session: Session,
    record: IdentificationRecord,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Tell the ledger of an identification that was made here, once all its rows are in the session."""
    workspace.record(
        session,
        "identification.recorded",
        "lineage",
        record.lineage.name,
        {
            "identification": record.id,
            "dimension": record.dimension.name,
            "method": record.method,
            "preset": record.preset,
            "settings_digest": record.settings_digest,
            "seed": record.seed,
            "state_digest": record.state_digest,
            "artifact": record.artifact_digest,
            **details,
            **record.summary["counts"],
        },
        records=[record],
    )


def stored_identification(
    workspace: Workspace, method: str, artifact_digest: str, summary: Mapping[str, Any]
) -> Selection:
    """Open an identification's tensors, checked against their digest."""
    return method_of(method).stored(summary["found"], TensorFile(workspace.store.verify(artifact_digest)))


def settings_digest(settings: Settings) -> str:
    """Return the SHA-256 of the canonical JSON of all settings. No two methods have the same fields."""
    return hashlib.sha256(ledger.canonical(settings.model_dump(mode="json"))).hexdigest()


def _prompts(
    workspace: Workspace, session: Session, dimension: SafetyDimension, settings: Settings
) -> tuple[dict[str, tuple[PromptRow, ...]], tuple[int, ...]]:
    """The prompts that the method calibrates with, by purpose, and the ids of their sets."""
    rows: dict[str, tuple[PromptRow, ...]] = {}
    identifiers = []
    for purpose in settings.purposes:
        sets = queries.prompt_sets(session, dimension_id=dimension.id, purpose=purpose)
        if not sets:
            raise InputError(f"dimension {dimension.name} has no {purpose} prompts", "register it again with both")
        rows[purpose] = parse_canonical(workspace.store.read_bytes(sets[0].digest))[: settings.prompts]
        identifiers.append(sets[0].id)
    return rows, tuple(identifiers)


def _store(workspace: Workspace, found: Found) -> str:
    with workspace.store.writer() as path:
        try:
            save_file({name: tensor.contiguous() for name, tensor in found.tensors().items()}, path)
        except (SafetensorError, OSError) as error:
            raise SpaceError(
                f"the identification cannot be written to {workspace.store.directory} ({error})",
                "free space there, or mend its permissions",
            ) from error
        return workspace.store.commit(path)


def _counts(found: Found, settings: Settings) -> dict[str, int]:
    """How many neurons were chosen: none where directions are to be claimed, of which the summary has the ranks."""
    if settings.protects_directions:
        directions = sum(entry["directions"] for entry in found.summary()["modules"])
        counts = dict.fromkeys(("neurons_selected", "neurons_already_protected", "benign_overlap"), 0)
        return {**counts, "directions": directions}
    return {
        "neurons_selected": sum(len(module.selected) for module in found.modules),
        "neurons_already_protected": sum(len(module.already_protected) for module in found.modules),
        "benign_overlap": sum(len(module.benign_overlap) for module in found.modules),
    }


def _record_details(session: Session, identification_id: int, found: Found, prompt_set_ids: tuple[int, ...]) -> None:
    for prompt_set_id in prompt_set_ids:
        session.add(IdentificationPromptSet(identification_id=identification_id, prompt_set_id=prompt_set_id))
    for layer in found.layer_scores:
        session.add(
            LayerScore(
                identification_id=identification_id,
                block=layer.block,
                gap=layer.gap,
                growth=layer.growth,
                in_scope=layer.in_scope,
            )
        )
    session.flush()


def _record_neurons(session: Session, identification_id: int, found: Found, lineage: LineageState) -> None:
    for module in found.modules:
        rows = _neuron_rows(
            identification_id,
            lineage.module_ids[module.module],
            module,
            lineage.holders(module.module),
        )
        insert_rows(session, IdentifiedNeuron, rows)


def _neuron_rows(
    identification_id: int, module_id: int, module: FoundModule, holders: Mapping[int, int]
) -> Iterator[dict[str, Any]]:
    dispositions = [
        (module.selected, "selected"),
        (module.benign_overlap, "benign-overlap"),
    ]
    for rows, disposition in dispositions:
        values = zip(rows.tolist(), module.scores[rows].tolist(), module.ranks[rows].tolist(), strict=True)
        for neuron, score, rank in values:
            yield {
                "identification_id": identification_id,
                "module_id": module_id,
                "neuron": neuron,
                "score": score,
                "rank": rank,
                "disposition": "protected" if neuron in holders and disposition == "selected" else disposition,
                "protected_by": holders.get(neuron),
            }


def _summary(record: IdentificationRecord, *, reused: bool) -> IdentificationSummary:
    found = record.summary["found"]
    return IdentificationSummary(
        identification=record.id,
        lineage=record.lineage.name,
        dimension=record.dimension.name,
        method=record.method,
        preset=record.preset,
        settings=record.settings,
        head=record.summary["head_sequence"],
        **{"directions": 0, **record.summary["counts"]},
        selected_parameters=found["selected_parameters"],
        linear_parameters=found["linear_parameters"],
        overlap=found.get("overlap"),
        rank_correlation=found.get("rank_correlation"),
        aligned_loss=found.get("aligned_loss"),
        head_loss=found.get("head_loss"),
        layers=tuple(
            {"block": layer.block, "gap": layer.gap, "growth": layer.growth, "in_scope": layer.in_scope}
            for layer in record.layer_scores
        ),
        choices=tuple(found.get("choices", ())),
        reference=record.summary.get("reference"),
        safe_answers=record.summary.get("safe_answers"),
        unreached=tuple(found["unreached"]),
        warnings=tuple(record.summary["warnings"]),
        ran=record.summary.get("ran", {}),
        created_at=record.created_at,
        reused=reused,
    )
