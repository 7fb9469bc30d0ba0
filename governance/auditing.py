"""Auditing: whether record, artifacts, claims and weights still agree."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from algorithms.adapters import ADAPTER_CONFIG
from governance.event_log import event_payload
from governance.lineage_state import Recorded, recorded_state
from governance.patch_artifact import PatchArtifact, open_artifact
from governance.provenance import origin_digest
from governance.weight_state import changed_file, changed_files
from governance.working_files import measure_working
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import claims, ledger, queries
from registry.errors import ArtifactError
from registry.heads import Head, check_ledger
from registry.schema import Lineage, Model, Patch


@dataclass(frozen=True)
class Finding:
    """Something that does not agree: what was checked, which record or file, and what is wrong."""

    check: str
    subject: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """The outcome of `audit verify`: how many of each were checked, what was not, and every finding."""

    checked: dict[str, int]
    not_checked: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify(workspace: Workspace, *, weights: bool = False, lineage: str | None = None) -> Verification:
    """Check the ledger against its exported heads, artifacts against digests, claims against artifacts, and files.

    Args:
        workspace: the registry.
        weights: hash every file of models and working checkpoints, and every tensor of the latter.
        lineage: check the records of this lineage only; the ledger is always checked whole.

    Raises:
        RecordNotFoundError: no lineage of that name.
    """
    findings: list[Finding] = []
    checked: dict[str, int] = {}
    with workspace.registry.read() as session:
        heads = workspace.registry.heads.read()
        events = list(ledger.events(session))
        findings += [
            Finding("ledger", f"event {violation.sequence}" if violation.sequence else "ledger", violation.problem)
            for violation in check_ledger(heads, events)
        ]
        if events and not any(isinstance(head, Head) for head in heads):
            findings.append(Finding("ledger", str(workspace.registry.heads.path), "the exported heads are missing"))
        checked |= {"events": len(events), "exported heads": len(heads)}
        lineages = [queries.get_lineage(session, lineage)] if lineage else list(queries.list_lineages(session))
        findings += _check_artifacts(workspace, session, lineages, checked)
        for record in lineages:
            findings += _check_claims(workspace, session, record, checked)
            findings += _check_states(session, record, events)
            findings += _check_working(record, checked, weights=weights)
        models = _models(session, lineages if lineage else None)
        for model in models:
            findings += [
                Finding("model", model.name, problem)
                for problem in changed_files(Path(model.path), model.files, always_hash=weights)
            ]
            findings += _check_registration(model, events)
        checked["models"] = len(models)
    not_checked = [] if weights else ["file contents whose size and time are as recorded (pass --weights)"]
    return Verification(checked, tuple(not_checked), tuple(findings))


def _models(session: Session, lineages: list[Lineage] | None) -> list[Model]:
    if lineages is None:
        return list(queries.list_models(session))
    found = {
        model.id: model
        for lineage in lineages
        for direct in (lineage.subject, lineage.aligned, lineage.base)
        for model in (direct, direct.base_model)
        if model is not None
    }
    return list(found.values())


def _check_artifacts(
    workspace: Workspace, session: Session, lineages: list[Lineage], checked: dict[str, int]
) -> list[Finding]:
    wanted: dict[str, str] = {}
    for lineage in lineages:
        for patch in queries.list_patches(session, lineage.id):
            if patch.artifact_digest:
                wanted[patch.artifact_digest] = f"patch {patch.sequence} of {lineage.name}"
            if patch.identification.artifact_digest:
                wanted[patch.identification.artifact_digest] = f"identification {patch.identification_id}"
    for prompt_set in queries.prompt_sets(session):
        wanted.setdefault(prompt_set.digest, f"{prompt_set.purpose} prompts of {prompt_set.source}")
    findings = []
    for digest, subject in wanted.items():
        try:
            workspace.store.verify(digest)
        except ArtifactError as error:
            findings.append(Finding("artifact", subject, error.problem))
    checked["artifacts"] = len(wanted)
    return findings


def _check_claims(
    workspace: Workspace, session: Session, lineage: Lineage, checked: dict[str, int]
) -> Iterator[Finding]:
    """Every claim is a row of its patch's artifact, and every row of an applied patch is claimed."""
    names = {number: name for name, number in queries.module_ids(session, lineage.subject_id).items()}
    held: dict[int, dict[str, array[int]]] = {}
    for claim in claims.claims(session, lineage.id):
        name = names.get(claim.module_id, f"module id {claim.module_id}")
        held.setdefault(claim.patch_id, {})[name] = claim.neurons
    applied = queries.applied_patches(session, lineage.id)
    for patch in applied:
        claimed = held.pop(patch.id, {})
        count = sum(len(neurons) for neurons in claimed.values())
        checked["protected neurons"] = checked.get("protected neurons", 0) + count
        try:
            with open_artifact(workspace.store.path(patch.artifact_digest or "")) as artifact:
                problems = list(islice(_disagreements(claimed, artifact), 5))
        except NeuronLedgerError:
            continue  # named by the check of artifacts
        for problem in problems:
            yield Finding("claims", f"patch {patch.sequence} of {lineage.name}", problem)
    for patch_id, orphans in held.items():
        count = sum(len(neurons) for neurons in orphans.values())
        yield Finding("claims", lineage.name, f"{count} neurons are claimed by patch id {patch_id}, not applied")
    checked["patches applied"] = checked.get("patches applied", 0) + len(applied)


def _disagreements(claimed: Mapping[str, "array[int]"], artifact: PatchArtifact) -> Iterator[str]:
    written = {module.name for module in artifact.modules}
    for module in sorted(claimed.keys() | written):
        neurons = set(claimed.get(module, ()))
        rows = set(artifact.rows(module).tolist()) if module in written else set()
        for neuron in sorted(neurons ^ rows):
            what = "claimed, but not in its artifact" if neuron in neurons else "written, but not claimed"
            yield f"neuron {neuron} of {module} is {what}"


def _check_registration(model: Model, events: list[ledger.Event]) -> Iterator[Finding]:
    """What is recorded of a model's files is what the ledger says was registered."""
    told = [
        event_payload(event)
        for event in events
        if (event.action, event.subject_name) == ("model.registered", model.name)
    ]
    recorded = {
        "state_digest": model.state_digest,
        "path": model.path,
        "role": model.role,
        "files": {file.file: file.digest for file in model.files},
        "made_from": model.details.get("made_from"),
    }
    if not told:
        yield Finding("records", f"model {model.name}", "the ledger does not tell of its registration")
        return
    for name, value in recorded.items():
        if told[-1].get(name) != value:
            yield Finding("records", f"model {model.name}", f"its recorded {name} is not the registered one")


def _check_states(session: Session, lineage: Lineage, events: list[ledger.Event]) -> Iterator[Finding]:
    """What the ledger says became of each patch is what its record says, and the head's digest with it."""
    actions: dict[int, str] = {}
    told: dict[int, dict[str, Any]] = {}
    digest: str | None = None
    for event in events:
        if event.subject_kind != "lineage" or event.subject_name != lineage.name:
            continue
        payload = event_payload(event)
        if event.action in _STATE_AFTER and "patch" in payload:
            sequence = payload["patch"]
            actions[sequence] = event.action
            if event.action in _DESCRIBES_PATCH:
                told.setdefault(sequence, {"actor": event.actor}).update(payload)
        for key in ("state_digest", "digest_after"):
            if event.action in _MOVES_HEAD and key in payload:
                digest = payload[key]
    for patch in queries.list_patches(session, lineage.id):
        action = actions.get(patch.sequence, "")
        if _STATE_AFTER.get(action) != patch.state:
            yield Finding(
                "records",
                f"patch {patch.sequence} of {lineage.name}",
                f"its record says {patch.state}, the ledger's last event {action or 'nothing'}",
            )
        yield from _compare_patch(lineage, patch, told.get(patch.sequence, {}))
    for sequence in actions.keys() - {patch.sequence for patch in queries.list_patches(session, lineage.id)}:
        yield Finding("records", f"patch {sequence} of {lineage.name}", "the ledger speaks of it, but it has no record")
    if digest is not None and digest != lineage.state_digest:
        yield Finding("records", f"lineage {lineage.name}", "its digest is not that of the ledger's last change")


def _compare_patch(lineage: Lineage, patch: Patch, payload: dict[str, Any]) -> Iterator[Finding]:
    recorded = {
        "artifact": patch.artifact_digest or "",
        "digest_before": patch.digest_before,
        "digest_after": patch.digest_after,
        "neurons_modified": patch.neurons_modified,
        "neurons_selected": patch.neurons_selected,
        "parameters_modified": patch.parameters_modified,
        "dimension": patch.dimension.name,
        "identification": patch.identification_id,
        "settings_digest": hashlib.sha256(ledger.canonical(patch.settings)).hexdigest(),
        "actor": patch.actor,
        "reason": patch.reason or "",
        "rows_unchanged": patch.rows_unchanged,
        "neurons_already_protected": patch.neurons_protected,
    }
    for name, value in recorded.items():
        if name in payload and payload[name] != value:
            yield Finding(
                "records",
                f"patch {patch.sequence} of {lineage.name}",
                f"its record has {name} = {value}, the ledger {payload[name]}",
            )
    if payload.get("provenance") != origin_digest(patch.origin):
        yield Finding(
            "records",
            f"patch {patch.sequence} of {lineage.name}",
            "what its record says of where it came from is not what the ledger says",
        )


def _check_working(lineage: Lineage, checked: dict[str, int], *, weights: bool) -> Iterator[Finding]:
    working = Path(lineage.working_path)
    recorded: Recorded = recorded_state(lineage)
    subject = f"lineage {lineage.name}"
    if not weights:
        for problem in changed_files(working, recorded.files):
            yield Finding("weights", subject, problem)
        return
    try:
        measured = measure_working(working, recorded)
    except (NeuronLedgerError, OSError) as error:
        yield Finding("weights", subject, str(error))
        for problem in changed_files(working, recorded.files, always_hash=True, algorithms=recorded.algorithms):
            yield Finding("weights", subject, problem)
        return
    digests = {(file.file, file.digest_algorithm): file.digest for file in measured.files}
    for file in recorded.files:
        if digests.get((file.file, file.digest_algorithm), file.digest) != file.digest:
            yield Finding("weights", subject, changed_file(working, file))
    for name, tensor in recorded.tensors.items():
        found = measured.tensors.get(name)
        if found is None or found.digest != tensor.digest:
            yield Finding("weights", f"lineage {lineage.name}", f"tensor {name} is not what was recorded")
    if measured.digest != lineage.state_digest:
        yield Finding("weights", f"lineage {lineage.name}", "its weights do not have the digest of its head")
    checked["tensors"] = checked.get("tensors", 0) + len(measured.tensors)
    followed = len(measured.files) - any(file.file == ADAPTER_CONFIG for file in measured.files)
    checked["weight files"] = checked.get("weight files", 0) + followed


_DESCRIBES_PATCH = frozenset({"patch.applying", "patch.applied"})
_MOVES_HEAD = frozenset({"lineage.created", "patch.applied", "patch.reverted", "patch.undone", "patch.revert-undone"})
_STATE_AFTER = {
    "patch.applying": "applying",
    "patch.applied": "applied",
    "patch.undone": "rejected",
    "patch.reverting": "reverting",
    "patch.reverted": "reverted",
    "patch.revert-undone": "applied",
}
