"""Identification: find the neurons of a dimension in a lineage at its head, and record how they were found."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from sqlalchemy.orm import Session
from torch import nn

from algorithms.calibration import CalibrationItem, calibration_items, padding_id
from algorithms.fgsn import Identification, ModuleIdentification, identify
from algorithms.generation import generate
from algorithms.identifications import StoredIdentification
from algorithms.loading import load_model, load_tokenizer
from algorithms.settings import FgsnSettings, ModelRole
from governance.errors import InputError, SpaceError
from governance.lineage_state import LineageState, read_lineage
from governance.prompt_sets import PromptRow, canonical_rows, parse_canonical
from governance.tensor_file import TensorFile
from governance.workspace import Workspace
from registry import ledger, queries
from registry.bulk import insert_rows
from registry.schema import Identification as IdentificationRecord
from registry.schema import IdentificationPromptSet, IdentifiedNeuron, LayerScore, SafetyDimension

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class IdentificationSummary:
    """One identification, as `identify` shows it."""

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
    selected_parameters: int
    linear_parameters: int
    overlap: float | None
    rank_correlation: float | None
    layers: tuple[dict[str, Any], ...]
    unreached: tuple[str, ...]
    warnings: tuple[str, ...]
    created_at: datetime
    reused: bool


@dataclass(frozen=True)
class CalibrationPrompts:
    """The prompts of one identification, and which prompt sets and answers they came from."""

    harmful: tuple[PromptRow, ...]
    benign: tuple[PromptRow, ...]
    prompt_set_ids: tuple[int, ...]


class ModelCache:
    """Loads a lineage's models for forward passes; keeps the last one, so that answering and measuring share it."""

    def __init__(self, lineage: LineageState) -> None:
        self._lineage = lineage
        self._role: ModelRole | None = None
        self._model: nn.Module | None = None

    def load(self, role: ModelRole) -> nn.Module:
        """Return the aligned model or the head, ready for a forward pass."""
        if role != self._role or self._model is None:
            self._model = None
            location = self._lineage.locations["aligned" if role == "aligned" else "subject"]
            path = location.path if role == "aligned" else self._lineage.working
            self._model, _ = load_model(path, location.base_path)
            self._role = role
        return self._model


def run_identification(
    workspace: Workspace,
    lineage_name: str,
    dimension_name: str,
    settings: FgsnSettings,
    preset: str | None = None,
    *,
    reuse: bool = False,
) -> IdentificationSummary:
    """Identify the neurons of a dimension in a lineage at its head, and record them.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        dimension_name: the dimension, whose harmful and benign prompts calibrate.
        settings: every choice of the method.
        preset: name of the preset that the settings came from, for the record.
        reuse: return the newest identification with the same settings at the same head, if there is one.

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
            prompts = _prompts(workspace, session, dimension, settings)
            dimension_id = dimension.id
        lineage = read_lineage(workspace, lineage_name)
        found, answers_digest = _identify(workspace, lineage, prompts, settings)
        artifact = _store(workspace, found)
        record = IdentificationRecord(
            lineage_id=lineage.lineage_id,
            dimension_id=dimension_id,
            method="fgsn",
            preset=preset,
            settings=settings.model_dump(mode="json"),
            settings_digest=digest,
            seed=settings.seed,
            head_patch_id=lineage.head_patch_id,
            state_digest=lineage.state_digest,
            library_versions={"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            summary={
                "found": found.summary(),
                "answers": answers_digest,
                "counts": _counts(found),
                "head_sequence": lineage.head_sequence,
                "warnings": list(settings.warnings()),
            },
            artifact_digest=artifact,
            created_at=workspace.clock(),
            actor=workspace.actor,
        )
        with workspace.registry.write() as session:
            session.add(record)
            session.flush()
            _record_details(session, record.id, found, lineage, prompts)
            workspace.record(
                session,
                "identification.recorded",
                "lineage",
                lineage_name,
                {
                    "identification": record.id,
                    "dimension": dimension_name,
                    "method": "fgsn",
                    "preset": preset,
                    "settings_digest": digest,
                    "seed": settings.seed,
                    "state_digest": lineage.state_digest,
                    "artifact": artifact,
                    **_counts(found),
                },
            )
        with workspace.registry.read() as session:
            return _summary(session.get_one(IdentificationRecord, record.id), reused=False)


def stored_identification(
    workspace: Workspace, artifact_digest: str, summary: Mapping[str, Any]
) -> StoredIdentification:
    """Open an identification's tensors, checked against their digest."""
    return StoredIdentification(summary["found"], TensorFile(workspace.store.verify(artifact_digest)))


def settings_digest(settings: FgsnSettings) -> str:
    """Return the SHA-256 of the canonical JSON of all settings."""
    return hashlib.sha256(ledger.canonical(settings.model_dump(mode="json"))).hexdigest()


def _prompts(
    workspace: Workspace, session: Session, dimension: SafetyDimension, settings: FgsnSettings
) -> CalibrationPrompts:
    rows: dict[str, tuple[PromptRow, ...]] = {}
    identifiers = []
    for purpose in ("harmful", "benign"):
        sets = queries.prompt_sets(session, dimension_id=dimension.id, purpose=purpose)
        if not sets:
            raise InputError(f"dimension {dimension.name} has no {purpose} prompts", "register it again with both")
        rows[purpose] = parse_canonical(workspace.store.read_bytes(sets[0].digest))[: settings.prompts]
        identifiers.append(sets[0].id)
    return CalibrationPrompts(rows["harmful"], rows["benign"], tuple(identifiers))


def _identify(
    workspace: Workspace, lineage: LineageState, prompts: CalibrationPrompts, settings: FgsnSettings
) -> tuple[Identification, str | None]:
    location = lineage.locations["aligned"]
    tokenizer = load_tokenizer(location.path, location.base_path)
    models = ModelCache(lineage)
    harmful = _answered(workspace, prompts.harmful, models, tokenizer, settings)
    benign = _answered(workspace, prompts.benign, models, tokenizer, settings)
    answers = None
    if (harmful, benign) != (prompts.harmful, prompts.benign):
        answers = workspace.store.put_bytes(canonical_rows((*harmful, *benign)))
    found = identify(
        lineage.subject,
        lineage.aligned,
        lineage.head,
        load=models.load,
        harmful=_items(tokenizer, harmful, settings),
        benign=_items(tokenizer, benign, settings),
        pad_id=padding_id(tokenizer),
        settings=settings,
        protected=lineage.protected,
        progress=workspace.progress,
    )
    return found, answers


def _answered(
    workspace: Workspace, rows: tuple[PromptRow, ...], models: ModelCache, tokenizer: Any, settings: FgsnSettings
) -> tuple[PromptRow, ...]:
    """Let the aligned model begin its answer where the prompt set has none and answer tokens are to be counted."""
    measured = settings.needs_gram or settings.needs_input_norms or settings.needs_outputs
    if "answer" not in settings.token_kinds or not measured:
        return rows
    missing = [row.prompt for row in rows if row.answer is None]
    if not missing:
        return rows

    def report(done: int, total: int) -> None:
        workspace.progress("answers of the aligned model", done, total)

    answers = iter(
        generate(
            models.load("aligned"),
            tokenizer,
            missing,
            max_new_tokens=settings.answer_tokens,
            batch_size=settings.batch_size,
            progress=report,
        )
    )
    return tuple(row if row.answer is not None else PromptRow(row.prompt, next(answers)) for row in rows)


def _items(tokenizer: Any, rows: tuple[PromptRow, ...], settings: FgsnSettings) -> list[CalibrationItem]:
    return calibration_items(
        tokenizer,
        [row.prompt for row in rows],
        [row.answer for row in rows],
        settings.token_kinds,
        settings.answer_tokens,
    )


def _store(workspace: Workspace, found: Identification) -> str:
    with workspace.store.writer() as path:
        try:
            save_file({name: tensor.contiguous() for name, tensor in found.tensors().items()}, path)
        except (SafetensorError, OSError) as error:
            raise SpaceError(
                f"the identification cannot be written to {workspace.store.directory} ({error})",
                "free space there, or mend its permissions",
            ) from error
        return workspace.store.commit(path)


def _counts(found: Identification) -> dict[str, int]:
    return {
        "neurons_selected": sum(len(module.selected) for module in found.modules),
        "neurons_already_protected": sum(len(module.already_protected) for module in found.modules),
        "benign_overlap": sum(len(module.benign_overlap) for module in found.modules),
    }


def _record_details(
    session: Session, identification_id: int, found: Identification, lineage: LineageState, prompts: CalibrationPrompts
) -> None:
    for prompt_set_id in prompts.prompt_set_ids:
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
    for module in found.modules:
        rows = _neuron_rows(
            identification_id,
            lineage.module_ids[module.module],
            module,
            lineage.holders(module.module),
        )
        insert_rows(session, IdentifiedNeuron, rows)


def _neuron_rows(
    identification_id: int, module_id: int, module: ModuleIdentification, holders: Mapping[int, int]
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
        **record.summary["counts"],
        selected_parameters=found["selected_parameters"],
        linear_parameters=found["linear_parameters"],
        overlap=found["overlap"],
        rank_correlation=found["rank_correlation"],
        layers=tuple(
            {"block": layer.block, "gap": layer.gap, "growth": layer.growth, "in_scope": layer.in_scope}
            for layer in record.layer_scores
        ),
        unreached=tuple(found["unreached"]),
        warnings=tuple(record.summary["warnings"]),
        created_at=record.created_at,
        reused=reused,
    )
