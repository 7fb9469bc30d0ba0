"""Auditing: whether record, artifacts, claims and weights still agree."""

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from algorithms.adapters import ADAPTER_CONFIG
from algorithms.parallel import in_parallel
from algorithms.weights import open_weights
from governance.catalogue import weights_of
from governance.direction_checks import check_actions
from governance.lineage_state import Recorded, location_of, recorded_state
from governance.patch_artifact import PatchArtifact, open_artifact
from governance.proof_checks import Evidence, check_proof
from governance.record_checks import (
    Disagreement,
    RecordCheck,
    check_records,
    check_registration,
    check_states,
)
from governance.timestamp_checks import Timestamp
from governance.timestamping import kept_tokens
from governance.weight_state import changed_file, changed_files, changed_in
from governance.working_files import measure_working
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import claims, ledger, locks, queries
from registry.errors import ArtifactError, LockedError, RegistryBusyError
from registry.record_digests import records_of_lineage
from registry.record_forms import Word
from registry.schema import Identification, Lineage, LineageLock, Model, Patch, PromptSet, TrainedJudge
from registry.signatures import SignedBy

Chosen = TypeVar("Chosen", Lineage, Model, Patch, Identification, PromptSet, TrainedJudge)


@dataclass(frozen=True)
class Finding:
    """Something that does not agree: what was checked, which record or file, and what is wrong."""

    check: str
    subject: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """The outcome of `audit verify`: how many of each were checked, what was not, and every finding.

    Attributes:
        signed_by: what each key has signed of the exported heads.
        unsigned_from: the first event that no signature covers; None if there is no such event.
        timestamps: what time-stamping authorities that are trusted say of the ledger.
    """

    checked: dict[str, int]
    not_checked: tuple[str, ...]
    findings: tuple[Finding, ...]
    signed_by: tuple[SignedBy, ...] = ()
    unsigned_from: int | None = None
    timestamps: tuple[Timestamp, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify(
    workspace: Workspace,
    *,
    weights: bool = False,
    lineage: str | None = None,
    evidence: Evidence | None = None,
) -> Verification:
    """Check the ledger against its exported heads, every record against the ledger, artifacts, claims and files.

    Args:
        workspace: the registry.
        weights: hash every weight file of models and working checkpoints, and every tensor of the latter.
        lineage: check the records of this lineage only; the ledger is always checked whole.
        evidence: keys that may sign heads, copies that were kept elsewhere, and the like.

    Raises:
        RecordNotFoundError: no lineage of that name.
        LockedError: nothing was found, but a process, which is named, is writing a patch to a lineage.
        RegistryBusyError: a patch was begun or finished while its lineage was checked.
        RegistryError: there are timestamps to be checked, and the extra is not installed.
    """
    findings: list[Finding] = []
    checked: dict[str, int] = {}
    held: list[LockedError] = []
    tokens = kept_tokens(workspace.registry)  # first: what they are of is in the ledger that is read then
    with workspace.registry.read_with_heads() as (session, heads):
        events = list(ledger.events(session))
        proof = check_proof(events, heads, evidence or Evidence(), tokens)
        findings += [Finding("ledger", subject, problem) for subject, problem in proof.problems]
        checked |= proof.checked
        chosen = records_of_lineage(session, queries.lineage_id(session, lineage)) if lineage else None
        records = check_records(session, events, lineage, chosen)
        findings += _of_records(records.disagreements)
        checked |= records.compared
        if records.readable:
            findings += _check_content(workspace, session, events, chosen, checked, held, weights=weights)
    if held and not findings:
        raise held[0]
    not_checked = (*_not_checked(records, held, weights=weights), *proof.not_checked)
    return Verification(checked, not_checked, tuple(findings), proof.signed_by, proof.unsigned_from, proof.timestamps)


def _not_checked(records: RecordCheck, held: Iterable[LockedError], *, weights: bool) -> Iterator[str]:
    if records.without_digest:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in records.without_digest.items())
        yield f"every column of {counts}, recorded before the ledger held digests of records"
    if not records.readable:
        yield "artifacts, claims, models and weights, since there are records that cannot be read"
    elif not weights:
        yield "file contents whose size and time are as recorded (pass --weights)"
    if records.readable:
        yield "files that hold no weights, such as config.json and the tokenizer (audit explain compares them)"
    for error in held:
        yield f"claims and weights that are being written: {error.problem}"


def _of_records(disagreements: Iterable[Disagreement]) -> Iterator[Finding]:
    return (Finding("records", found.subject, found.problem) for found in disagreements)


def _check_content(
    workspace: Workspace,
    session: Session,
    events: list[ledger.Event],
    chosen: Mapping[Word, Collection[int]] | None,
    checked: dict[str, int],
    held: list[LockedError],
    *,
    weights: bool,
) -> Iterator[Finding]:
    """What the records speak of: artifacts, claims, working checkpoints and the models' files.

    The locks of processes that are at work are added to `held`; claims and weights of their lineages are not checked.
    """
    yield from _check_artifacts(workspace, session, chosen, checked)
    for lineage in _records(session, Lineage, "lineage", chosen):
        yield from _of_records(check_states(session, lineage, events))
        lock = locks.holder(session, lineage.id)
        unfinished = queries.unfinished_patches(session, lineage.id)
        yield from _unfinished(unfinished, lock)
        if lock is None or not unfinished:
            yield from _check_claims(workspace, session, lineage, checked)
            differing = list(_check_weights(workspace, session, lineage, checked, weights=weights))
            if differing:
                _require_same(workspace, session, lineage)
            yield from differing
        elif locks.liveness(lock) == "dead":
            _require_same(workspace, session, lineage)
        else:
            held.append(locks.locked_error(lineage.name, lock))
    models = _records(session, Model, "model", chosen)
    changed = changed_in([(Path(model.path), model.files) for model in models], always_hash=weights)
    for model, problems in zip(models, changed, strict=True):
        for problem in problems:
            yield Finding("model", model.name, problem)
        yield from _of_records(check_registration(model, events))


def _records(
    session: Session, table: type[Chosen], word: Word, chosen: Mapping[Word, Collection[int]] | None
) -> Sequence[Chosen]:
    """The records of a kind by id, all of them or the chosen ones."""
    query = select(table).order_by(table.id)
    return session.scalars(query if chosen is None else query.where(table.id.in_(chosen[word]))).all()


def _check_artifacts(
    workspace: Workspace, session: Session, chosen: Mapping[Word, Collection[int]] | None, checked: dict[str, int]
) -> list[Finding]:
    """Every artifact has its digest. One that is damaged is a finding for each record that rests on it."""
    wanted: dict[str, list[str]] = {}

    def want(digest: object, subject: str) -> None:
        if digest and subject not in (subjects := wanted.setdefault(str(digest), [])):
            subjects.append(subject)

    for patch in _records(session, Patch, "patch", chosen):
        want(patch.artifact_digest, f"patch {patch.sequence} of {patch.lineage.name}")
    for identification in _records(session, Identification, "identification", chosen):
        for digest in (identification.artifact_digest, identification.summary.get("answers")):
            want(digest, f"identification {identification.id}")
    for prompt_set in _records(session, PromptSet, "prompt set", chosen):
        want(prompt_set.digest, f"{prompt_set.purpose} prompts of {prompt_set.source}")
    for judge in _records(session, TrainedJudge, "judge", chosen):
        want(judge.artifact_digest, f"judge {judge.name}")

    def problem(digest: str) -> str | None:
        try:
            workspace.store.verify(digest)
        except ArtifactError as error:
            return error.problem
        return None

    checked["artifacts"] = len(wanted)
    found = zip(wanted.values(), in_parallel(problem, wanted), strict=True)
    return [Finding("artifact", subject, told) for subjects, told in found if told is not None for subject in subjects]


def _check_claims(
    workspace: Workspace, session: Session, lineage: Lineage, checked: dict[str, int]
) -> Iterator[Finding]:
    """Every claim is a row of its patch's artifact, and every row of an applied patch is claimed."""
    names = {number: name for name, number in queries.module_ids(session, lineage.subject_id).items()}
    held: dict[int, dict[str, array[int]]] = {}
    for claim in claims.claims(session, lineage.id):
        name = names.get(claim.module_id, f"module id {claim.module_id}")
        held.setdefault(claim.patch_id, {})[name] = claim.neurons
    ranks: dict[int, dict[str, int]] = {}
    for directions in claims.protected_directions(session, lineage.id):
        name = names.get(directions.module_id, f"module id {directions.module_id}")
        ranks.setdefault(directions.patch_id, {})[name] = directions.rank
    applied = queries.applied_patches(session, lineage.id)
    for patch in applied:
        claimed, ranked = held.pop(patch.id, {}), ranks.pop(patch.id, {})
        if ranked:
            checked["protected directions"] = checked.get("protected directions", 0) + sum(ranked.values())
        count = sum(len(neurons) for neurons in claimed.values())
        checked["protected neurons"] = checked.get("protected neurons", 0) + count
        try:
            with open_artifact(workspace.store.path(patch.artifact_digest or "")) as artifact:
                problems = list(islice(chain(_disagreements(claimed, artifact), _misclaimed(ranked, artifact)), 5))
        except NeuronLedgerError:
            continue  # named by the check of artifacts
        for problem in problems:
            yield Finding("claims", f"patch {patch.sequence} of {lineage.name}", problem)
    for patch_id, orphans in held.items():
        count = sum(len(neurons) for neurons in orphans.values())
        yield Finding("claims", lineage.name, f"{count} neurons are claimed by patch id {patch_id}, not applied")
    for patch_id, orphaned in ranks.items():
        count = sum(orphaned.values())
        yield Finding("claims", lineage.name, f"{count} directions are claimed by patch id {patch_id}, not applied")
    checked["patches applied"] = checked.get("patches applied", 0) + len(applied)


def _disagreements(claimed: Mapping[str, "array[int]"], artifact: PatchArtifact) -> Iterator[str]:
    written = {module.name for module in artifact.modules if not module.directions}
    for module in sorted(claimed.keys() | written):
        neurons = set(claimed.get(module, ()))
        rows = set(artifact.rows(module).tolist()) if module in written else set()
        for neuron in sorted(neurons ^ rows):
            what = "claimed, but not in its artifact" if neuron in neurons else "written, but not claimed"
            yield f"neuron {neuron} of {module} is {what}"


def _misclaimed(claimed: Mapping[str, int], artifact: PatchArtifact) -> Iterator[str]:
    held = {module.name: module.directions for module in artifact.modules if module.directions}
    for module in sorted(claimed.keys() | held.keys()):
        if claimed.get(module) != held.get(module):
            yield f"{claimed.get(module, 0)} directions of {module} are claimed, its artifact has {held.get(module, 0)}"


def _check_actions(
    workspace: Workspace, session: Session, lineage: Lineage, checked: dict[str, int]
) -> Iterator[Finding]:
    """What the head does to claimed directions is what the claiming patch left, within the rounding of the files."""
    if not claims.protected_directions(session, lineage.id):
        return
    below = location_of(lineage.subject).base_path
    try:
        with ExitStack() as stack:
            applied = {
                patch.sequence: stack.enter_context(open_artifact(workspace.store.path(patch.artifact_digest or "")))
                for patch in queries.applied_patches(session, lineage.id)
            }
            head = open_weights(Path(lineage.working_path), below)
            actions = check_actions(weights_of(lineage.subject), head, applied)
    except (NeuronLedgerError, OSError) as error:
        yield Finding("directions", f"lineage {lineage.name}", str(error))
        return
    for sequence, module, rows in actions.moved:
        problem = f"{rows} rows of {module} act otherwise on the directions that it claims than it left them"
        yield Finding("directions", f"patch {sequence} of {lineage.name}", problem)
    label = "actions on protected directions"
    checked[label] = checked.get(label, 0) + actions.directions


def _unfinished(patches: Iterable[Patch], lock: LineageLock | None) -> Iterator[Finding]:
    """Patches that nobody is writing and that are neither applied nor reverted."""
    for patch in patches:
        if lock is None:
            problem = f"is {patch.state}, though no process holds its lineage: its state was changed by something else"
        elif locks.liveness(lock) == "dead":
            problem = f"is {patch.state}: it was interrupted; run neuronledger recover"
        else:
            continue
        yield Finding("interrupted", f"lineage {patch.lineage.name}", f"patch {patch.sequence} {problem}")


def _require_same(workspace: Workspace, session: Session, lineage: Lineage) -> None:
    """Refuse to blame the files of a lineage that somebody patched after its records were read.

    Raises:
        RegistryBusyError: somebody did.
    """
    with workspace.registry.read() as now:
        if _moment(now, lineage.id) != _moment(session, lineage.id):
            raise RegistryBusyError(f"lineage {lineage.name} changed while it was checked", "try again")


def _moment(session: Session, lineage_id: int) -> tuple[str, list[tuple[int, str]]]:
    unfinished = queries.unfinished_patches(session, lineage_id)
    return session.get_one(Lineage, lineage_id).state_digest, [(patch.id, patch.state) for patch in unfinished]


def _check_weights(
    workspace: Workspace, session: Session, lineage: Lineage, checked: dict[str, int], *, weights: bool
) -> Iterator[Finding]:
    yield from _check_working(lineage, checked, weights=weights)
    if weights:
        yield from _check_actions(workspace, session, lineage, checked)


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
