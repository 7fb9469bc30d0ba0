"""Everything that the report of a lineage shows, read from the registry and held apart from how it is shown.

Nothing here is computed anew but shares and sums: what was not recorded is None or empty, and the page says so.
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from algorithms.methods import draws_at_random
from governance.auditing import verify
from governance.metrics import is_rate
from governance.patch_creation import CANDIDATE
from governance.patch_records import rule_results
from governance.provenance import origin_summary
from governance.report_figures import figure_table, is_harmfulness
from governance.report_protection import direction_claims, overlap_table, protection_map
from governance.report_records import (
    ApprovalRecord,
    ChoiceRecord,
    ControlRecord,
    EventRecord,
    IdentificationRecord,
    LayerRecord,
    LedgerRecord,
    MeasurementRecord,
    ModelRecord,
    ModuleRecord,
    PatchRecord,
    PolicyRecord,
    PromptSetRecord,
    Report,
)
from governance.report_timeline import timeline
from governance.workspace import Workspace
from registry import ledger, queries
from registry.head_lines import Head, Line, MalformedHead
from registry.schema import Identification, Lineage, Model, Patch, PatchModule, Policy, PromptSet

EVENTS_SHOWN = 15
"""How many of the ledger's latest events are listed."""


def gather(workspace: Workspace, lineage_name: str) -> Report:
    """Read everything that the report of a lineage shows, and verify the records without hashing weights.

    Raises:
        RecordNotFoundError: no lineage of that name.
        RegistryError: the registry or its head file cannot be read.
    """
    verification = verify(workspace, lineage=lineage_name)
    with workspace.registry.read() as session:
        lineage = queries.get_lineage(session, lineage_name)
        events = list(ledger.events(session))
        controls = _controls(session, lineage)
        identifications = _identifications(session, lineage)
        patches = _patches(session, lineage, events)
        return Report(
            lineage=lineage.name,
            state=lineage.state,
            state_digest=lineage.state_digest,
            created_at=lineage.created_at,
            generated_at=workspace.clock(),
            head=lineage.head.sequence if lineage.head else None,
            is_control=_is_control(queries.list_patches(session, lineage.id)),
            models=_models(lineage),
            patches=patches,
            harmfulness=figure_table(session, lineage, controls, is_harmfulness),
            accuracy=figure_table(
                session, lineage, controls, lambda metric: is_rate(metric) and not is_harmfulness(metric)
            ),
            means=figure_table(session, lineage, controls, lambda metric: not is_rate(metric)),
            protection=protection_map(session, lineage),
            directions=direction_claims(session, lineage),
            overlaps=overlap_table(session, lineage),
            identifications=identifications,
            prompt_sets=_prompt_sets(session, lineage, patches, identifications),
            controls=tuple(ControlRecord(control.name, _patches(session, control, events)) for control in controls),
            measurements=_measurements(session, lineage),
            ledger=_ledger(events, workspace.registry.heads.read()),
            timeline=timeline(lineage.name, patches, events),
            verification=verification,
            policies=_policies(session, lineage),
        )


def _controls(session: Session, lineage: Lineage) -> list[Lineage]:
    """Lineages of the same subject with random neurons, by a method that this lineage was patched with."""
    kinds = {patch.kind for patch in queries.list_patches(session, lineage.id)}
    return [
        other
        for other in queries.list_lineages(session)
        if other.id != lineage.id
        and other.subject_id == lineage.subject_id
        and _is_control(patches := queries.list_patches(session, other.id))
        and (not kinds or {patch.kind for patch in patches} <= kinds)
    ]


def _is_control(patches: Sequence[Patch]) -> bool:
    return bool(patches) and all(draws_at_random(patch.settings) for patch in patches)


def _models(lineage: Lineage) -> tuple[ModelRecord, ...]:
    pairs: list[tuple[str, Model]] = [
        ("subject", lineage.subject),
        ("aligned", lineage.aligned),
        ("base", lineage.base),
    ]
    pairs += [(f"base of {model.name}", model.base_model) for _, model in pairs[:3] if model.base_model is not None]
    return tuple(
        ModelRecord(
            role=role,
            name=model.name,
            kind=model.kind,
            architecture=model.architecture,
            parameters=model.parameters,
            linear_parameters=model.linear_parameters,
            state_digest=model.state_digest,
        )
        for role, model in pairs
    )


def _patches(session: Session, lineage: Lineage, events: Sequence[ledger.Event]) -> tuple[PatchRecord, ...]:
    reasons = {
        content.get("patch"): content.get("reason") or ""
        for event in events
        if event.action == "patch.reverting" and event.subject_name == lineage.name
        for content in (event.content(),)
    }
    return tuple(
        PatchRecord(
            patch=patch.sequence,
            dimension=patch.dimension.name,
            method=patch.kind,
            operation=str(patch.settings.get("operation") or f"{patch.settings.get('form')} form"),
            state=patch.state,
            identification=patch.identification_id,
            neurons_selected=patch.neurons_selected,
            neurons_already_protected=patch.neurons_protected,
            neurons_modified=patch.neurons_modified,
            rows_unchanged=patch.rows_unchanged,
            parameters_modified=patch.parameters_modified,
            modified_share=patch.parameters_modified / patch.parameters_total,
            modified_linear_share=patch.parameters_modified / patch.linear_parameters_total,
            digest_before=patch.digest_before,
            digest_after=patch.digest_after,
            artifact=patch.artifact_digest,
            actor=patch.actor,
            reason=patch.reason or "",
            revert_reason=reasons.get(patch.sequence, ""),
            failure=patch.failure,
            origin=origin_summary(patch.origin),
            created_at=patch.created_at,
            applied_at=patch.applied_at,
            reverted_at=patch.reverted_at,
            modules=tuple(_module(record) for record in patch.modules),
            approvals=tuple(
                ApprovalRecord(approval.actor, approval.decision, approval.reason or "", approval.created_at)
                for approval in patch.approvals
            ),
            policy=f"{patch.policy.name} version {patch.policy.version}" if patch.policy else None,
            policy_digest=patch.policy.digest if patch.policy else None,
            gates=rule_results(patch),
        )
        for patch in queries.list_patches(session, lineage.id)
    )


def _module(record: PatchModule) -> ModuleRecord:
    return ModuleRecord(
        module=record.module.name,
        block=record.module.block,
        rows=record.rows,
        rows_unchanged=record.rows_unchanged,
        parameters=record.parameters,
        norm_before=record.norm_before,
        norm_after=record.norm_after,
        change_norm=record.update_norms.get("change"),
    )


def _identifications(session: Session, lineage: Lineage) -> tuple[IdentificationRecord, ...]:
    patches = queries.list_patches(session, lineage.id)
    records = session.scalars(
        select(Identification).where(Identification.lineage_id == lineage.id).order_by(Identification.id)
    )
    return tuple(
        IdentificationRecord(
            identification=record.id,
            dimension=record.dimension.name,
            patches=tuple(f"patch {patch.sequence}" for patch in patches if patch.identification_id == record.id),
            method=record.method,
            preset=record.preset,
            seed=record.seed,
            head=record.summary.get("head_sequence"),
            settings=record.settings,
            settings_digest=record.settings_digest,
            state_digest=record.state_digest,
            artifact=record.artifact_digest,
            answers=record.summary.get("answers"),
            libraries=record.library_versions,
            prompt_sets=tuple(held.id for held in record.prompt_sets),
            layers=tuple(LayerRecord(layer.block, layer.gap, layer.in_scope) for layer in record.layer_scores),
            benign_overlap_share=record.summary.get("found", {}).get("overlap"),
            unreached=tuple(record.summary.get("found", {}).get("unreached", ())),
            warnings=tuple(record.summary.get("warnings", ())),
            imported=bool(record.summary.get("imported")),
            created_at=record.created_at,
            choices=_choices(record),
            reference=_reference(record.summary.get("reference") or {}),
            safe_answers=_safe_answers(record.summary.get("safe_answers") or {}),
            ran=record.summary.get("ran", {}),
        )
        for record in records
    )


def _choices(record: Identification) -> tuple[ChoiceRecord, ...]:
    found = [ChoiceRecord(**choice) for choice in record.summary.get("found", {}).get("choices", ())]
    return tuple(sorted(found, key=lambda choice: choice.rank))


def _reference(record: dict[str, Any]) -> str:
    """The reference in words; empty for a method without one."""
    if not record:
        return ""
    recipe = record.get("made_from", record)
    made = ", ".join(f"{name} {recipe[name]}" for name in ("mode", "beta", "published_factor") if name in recipe)
    if not record["model"]:
        return f"extrapolated from {record['aligned']} and {record['base']} ({made})"
    return f"model {record['model']}{f' ({made})' if made else ''}, weights {record['state_digest']}"


def _safe_answers(record: dict[str, Any]) -> str:
    if not record.get("generated"):
        return f"{record['given']} given" if record else ""
    return f"{record['given']} given; of {record['generated']} generated {record['kept']} kept by {record['judge']}"


def _prompt_sets(
    session: Session,
    lineage: Lineage,
    patches: Sequence[PatchRecord],
    identifications: Sequence[IdentificationRecord],
) -> tuple[PromptSetRecord, ...]:
    """The sets of the lineage's dimensions, and others that it was measured on."""
    evaluations = queries.evaluations(session, lineage.id)
    used = {record.prompt_set_id for record in evaluations if record.prompt_set_id}
    dimensions = {patch.dimension for patch in patches} | {record.dimension for record in identifications}
    dimensions |= {record.dimension.name for record in evaluations if record.dimension}
    return tuple(
        PromptSetRecord(
            identifier=record.id,
            purpose=record.purpose,
            dimension=record.dimension.name if record.dimension else None,
            source=_source(record),
            rows=record.rows,
            digest=record.digest,
            where=_conditions(record.source_filter.get("where") or {}),
            prompt_columns=tuple(record.columns.get("prompt") or ()),
            answer_column=record.columns.get("answer"),
            limit=record.source_filter.get("limit"),
            dropped=record.source_filter.get("dropped") or 0,
        )
        for record in queries.prompt_sets(session)
        if record.id in used or (record.dimension and record.dimension.name in dimensions)
    )


def _conditions(where: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in where.items())


def _measurements(session: Session, lineage: Lineage) -> tuple[MeasurementRecord, ...]:
    return tuple(
        MeasurementRecord(
            at=record.created_at,
            stage=record.stage,
            metric=record.metric,
            dimension=record.dimension.name if record.dimension else None,
            prompt_set=record.prompt_set_id,
            judge=f"{record.judge} {record.judge_version or ''}".strip() if record.judge else None,
            generation=record.generation,
        )
        for record in queries.evaluations(session, lineage.id)
        if not record.stage.startswith(CANDIDATE)
    )


def _policies(session: Session, lineage: Lineage) -> tuple[PolicyRecord, ...]:
    own = (Policy.lineage_id == lineage.id) | Policy.lineage_id.is_(None)
    return tuple(
        PolicyRecord(
            record.created_at, record.name, record.version, record.digest, everywhere=record.lineage_id is None
        )
        for record in session.scalars(select(Policy).where(own).order_by(Policy.id))
    )


def _source(record: PromptSet) -> str:
    """A file by its last two parts: where it lay on somebody's disk is for the registry, not for a page to hand on."""
    path = PurePath(record.source)
    return "/".join(path.parts[-2:]) if path.is_absolute() else record.source


def _ledger(events: Sequence[ledger.Event], heads: Sequence[Line]) -> LedgerRecord:
    last = events[-1] if events else None
    head = heads[-1] if heads else None
    return LedgerRecord(
        events=len(events),
        last_hash=last.hash if last else ledger.GENESIS,
        exported_heads=len(heads),
        last_exported=_head_line(head) if head else None,
        agrees=isinstance(head, Head) and last is not None and (head.count, head.hash) == (last.sequence, last.hash),
        latest=tuple(_event(event) for event in events[-EVENTS_SHOWN:]),
    )


def _head_line(head: Line) -> str:
    return head.text if isinstance(head, MalformedHead) else head.line()


_FACTS = ("patch", "dimension", "model", "attempted", "neurons_selected", "neurons_modified", "neurons_released")


def _event(event: ledger.Event) -> EventRecord:
    content = event.content()
    facts = [f"{name.replace('_', ' ')} {content[name]}" for name in _FACTS if content.get(name) is not None]
    return EventRecord(
        sequence=event.sequence,
        created_at=event.created_at,
        actor=event.actor,
        action=event.action,
        subject=f"{event.subject_kind} {event.subject_name}",
        facts=", ".join(facts),
        hash=event.hash,
    )
