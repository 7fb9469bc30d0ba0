"""Patches taken elsewhere: the very same artifact and weights arrive, or nothing does and the file, row or subject is
named."""

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from sqlalchemy import text

from algorithms.errors import CheckpointError, MismatchError, NonFiniteError
from algorithms.safetensors_files import read_header
from cli import main
from governance.auditing import verify
from governance.errors import InputError, PatchFileError, PlanError, SpaceError
from governance.lineages import create_lineage
from governance.patch_artifact import FORMAT as ARTIFACT
from governance.patch_export import ExportSummary, export_patch
from governance.patch_file import PROVENANCE, PROVENANCE_DIGEST, open_patch_file
from governance.patch_import import dry_run_import, import_patch
from governance.patch_records import show_patch
from governance.patching import apply_patch
from governance.provenance import Provenance
from governance.recovery import recover
from governance.reporting import write_report
from governance.tensor_file import TensorFileWriter, TensorSpec, header_bytes
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry import queries
from registry.errors import ArtifactError, NeuronProtectedError, RecordNotFoundError, RegistryError
from registry.heads import HeadFile
from registry.ledger import canonical
from registry.schema import Identification
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, Operation, flip_byte, struck_by
from tests.governance.scenarios import (
    BENIGN,
    HARMFUL,
    Scenario,
    Trio,
    build,
    digests,
    register_dimensions,
    register_trio,
)
from tests.tiny_models import save_variant

KINDS = pytest.mark.parametrize("kind", ["full", "sharded", "half", "transposed", "lora", "rslora"])


@pytest.fixture
def trio_of(trios: Trios, adapter_trios: Trios) -> Callable[[str], Trio]:
    """Subjects of every kind."""
    made: dict[str, Callable[[], Trio]] = {
        "full": trios,
        "sharded": lambda: trios(shard_size="10KB"),
        "half": lambda: trios(dtype=torch.bfloat16),
        "transposed": lambda: trios("gpt2"),
        "lora": lambda: adapter_trios(on_aligned=False),
        "rslora": lambda: adapter_trios(on_aligned=False, use_rslora=True, rank=6, alpha=7),
    }
    return lambda kind: made[kind]()


@pytest.fixture
def exported(scenario: Scenario, tmp_path: Path) -> Path:
    """An exported patch of a full checkpoint."""
    scenario.apply("animals")
    return _export(scenario, tmp_path / "animals.patch")


@pytest.fixture
def target(scenarios: Scenarios, trios: Trios) -> Scenario:
    """Another registry, with a lineage of the same subject."""
    return scenarios(trios())


def _export(scenario: Scenario, path: Path, sequence: int = 1) -> Path:
    assert isinstance(export_patch(scenario.workspace, scenario.name, sequence, path), ExportSummary)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state(scenario: Scenario) -> tuple[Any, ...]:
    """Everything that a refused import must leave as it was."""
    with scenario.workspace.registry.read() as session:
        identifications = session.query(Identification).count()
    artifacts = scenario.workspace.store.list(), scenario.workspace.store.leftovers()
    return digests(scenario.working), scenario.states(), scenario.claims(), artifacts, identifications


def _require_refused(
    scenario: Scenario, file: Path, error: type[Exception] | tuple[type[Exception], ...], match: str, **options: Any
) -> None:
    """Importing and its dry run refuse the file alike, write nothing, and record the refusal."""
    before = _state(scenario)
    refusals = []
    for act in (dry_run_import, import_patch):
        with pytest.raises(error, match=match) as refusal:
            act(scenario.workspace, scenario.name, file, **options)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
    assert _state(scenario) == before
    assert [action for action, _ in scenario.events()][-2:] == ["refused", "refused"]
    assert scenario.events()[-1][1]["attempted"] == "patch.import"


@KINDS
def test_a_patch_arrives_in_another_registry_with_the_very_same_bytes(
    workspace: Workspace,
    scenarios: Scenarios,
    trio_of: Callable[[str], Trio],
    prompts: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    """There and back, on both databases; what is exported again is the same artifact, and everything is taken back."""
    trio = trio_of(kind)
    source = build(workspace, trio, prompts)
    applied = source.apply("animals")
    file = _export(source, tmp_path / "animals.patch")

    target = scenarios(trio)
    planned = dry_run_import(target.workspace, "line", file)
    assert target.states() == []
    summary = import_patch(target.workspace, "line", file, reason="from the other registry")
    assert (summary.state, summary.reason, summary.dimension) == ("applied", "from the other registry", "animals")
    assert planned.neurons_modified == summary.neurons_modified == applied.neurons_modified > 0
    assert (planned.rows_unchanged, planned.parameters_modified) == (
        applied.rows_unchanged,
        applied.parameters_modified,
    )
    assert (summary.artifact, summary.digest_after) == (applied.artifact, applied.digest_after)
    assert digests(target.working) == digests(source.working) != digests(trio.subject)
    assert target.claims() == source.claims()
    assert show_patch(target.workspace, "line", 1)[1] == show_patch(workspace, "line", 1)[1]
    target.require_sound()

    again = _export(target, tmp_path / "again.patch")
    assert open_patch_file(again).provenance.artifact == applied.artifact
    create_lineage(workspace, "twin", subject="subject", aligned="aligned", base="base")
    twin = Scenario(workspace, trio, "twin")
    back = import_patch(workspace, "twin", again)
    assert back.artifact == applied.artifact
    assert digests(twin.working) == digests(source.working)
    for scenario in (twin, target, source):
        scenario.revert()
        assert digests(scenario.working) == digests(trio.subject)
        assert scenario.claims() == {}
        scenario.require_sound()


def test_the_subject_may_lie_elsewhere_under_other_names(
    scenario: Scenario, sqlite_workspace: Workspace, exported: Path, prompts: Path, tmp_path: Path
) -> None:
    copied = Trio(
        *(
            Path(shutil.copytree(getattr(scenario.trio, role), tmp_path / role))
            for role in ("subject", "aligned", "base")
        )
    )
    target = build(sqlite_workspace, copied, prompts, "other")
    import_patch(sqlite_workspace, "other", exported)
    assert digests(target.working) == digests(scenario.working)
    target.require_sound()


def test_the_record_says_where_an_imported_patch_came_from(
    scenario: Scenario, target: Scenario, exported: Path
) -> None:
    import_patch(target.workspace, "line", exported)
    here, there = target.patch(1), scenario.patch(1)
    origin = open_patch_file(exported).provenance
    assert here.origin == origin.record()
    assert (origin.lineage, origin.patch, origin.artifact) == ("line", 1, there.artifact_digest)
    assert (origin.digest_before, origin.digest_after) == (there.digest_before, there.digest_after)
    assert (here.settings, here.kind) == (there.settings, "fgsn")
    with target.workspace.registry.read() as session:
        found = session.get_one(Identification, here.identification_id)
        assert found.artifact_digest is None
        assert (found.layer_scores, found.prompt_sets) == ([], [])
        assert found.summary["imported"] is True
        assert (found.settings_digest, found.seed, found.preset) == (
            origin.identification.settings_digest,
            origin.identification.seed,
            None,
        )
    events = dict(target.events())
    for action in ("patch.applying", "patch.applied"):
        assert events[action]["origin"] == {
            "lineage": "line",
            "patch": 1,
            "artifact": there.artifact_digest,
            "ledger_events": origin.ledger.events,
            "ledger_hash": origin.ledger.hash,
            "file_sha256": _sha256(exported),
        }
    event = dict(scenario.events())["patch.exported"]
    assert (event["patch"], event["files"]) == (1, {exported.name: _sha256(exported)})
    scenario.require_sound()
    summary, _ = show_patch(target.workspace, "line", 1)
    assert summary.origin is not None
    assert (summary.origin.lineage, summary.origin.patch, summary.origin.reason) == ("line", "1", "because of animals")
    assert show_patch(scenario.workspace, "line", 1)[0].origin is None


def test_provenance_follows_a_patch_through_two_imports(
    scenario: Scenario, target: Scenario, scenarios: Scenarios, exported: Path, tmp_path: Path
) -> None:
    import_patch(target.workspace, "line", exported)
    third = scenarios(scenario.trio)
    import_patch(third.workspace, "line", _export(target, tmp_path / "second.patch"))
    origin = third.patch(1).origin
    assert origin is not None
    assert origin["origin"] == open_patch_file(exported).provenance.record()
    assert origin["identification"]["settings"] == scenario.patch(1).settings
    third.require_sound()


def test_a_patch_file_holds_rows_and_provenance_but_no_prompt_and_no_path(scenario: Scenario, exported: Path) -> None:
    content = exported.read_bytes()
    for prompt in (*HARMFUL["animals"], *BENIGN):
        assert prompt.encode() not in content
    assert str(scenario.working.parent.parent).encode() not in content
    assert str(scenario.trio.subject).encode() not in content
    told = open_patch_file(exported).provenance
    assert {held.purpose: held.rows for held in told.dimension.prompt_sets} == {
        "harmful": 3,
        "benign": 4,
        "heldout": 2,
    }
    assert told.dimension.description == "about animals"
    assert (told.subject.name, told.subject.architecture, told.actor, told.reason) == (
        "subject",
        "llama",
        "tester",
        "because of animals",
    )
    assert {"torch", "transformers"} <= told.identification.library_versions.keys()
    artifact = load_file(scenario.artifact(1))
    ours = load_file(exported)
    assert artifact.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in artifact.items())
    with safe_open(exported, framework="pt") as handle:
        assert set(handle.metadata()) == {ARTIFACT, PROVENANCE, PROVENANCE_DIGEST}


def test_a_reverted_patch_can_be_taken_elsewhere(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    patched = digests(scenario.working)
    scenario.revert()
    import_patch(target.workspace, "line", _export(scenario, tmp_path / "reverted.patch"))
    assert digests(target.working) == patched
    target.require_sound()


def test_an_imported_patch_takes_its_place_among_others(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    """Before and after patches of the lineage's own, and taken back out of order."""
    scenario.apply("weapons")
    scenario.apply("animals", seed=5, budget=0.2)
    target.apply("weapons")
    alone = digests(target.working)
    kept = target.claimed_rows()
    import_patch(target.workspace, "line", _export(scenario, tmp_path / "second.patch", 2))
    assert digests(target.working) == digests(scenario.working)
    assert kept.items() <= target.claimed_rows().items()
    target.apply("insults", budget=0.3)
    target.require_sound()
    target.revert(3)
    target.revert(2)
    assert digests(target.working) == alone
    target.revert(1)
    assert digests(target.working) == digests(target.trio.subject)
    target.require_sound()


def test_nothing_is_planned_from_an_imported_identification(target: Scenario, exported: Path) -> None:
    """The same settings at the same head: the run is made anew, and what the import protects stays protected."""
    imported = import_patch(target.workspace, "line", exported)
    target.revert()
    found = target.identify("animals")
    assert not found.reused
    assert found.identification != imported.identification
    import_patch(target.workspace, "line", exported)
    again = target.apply("animals")
    assert again.neurons_selected == again.neurons_already_protected == imported.neurons_modified
    target.require_sound()


# --- what is refused


def _rewrite(
    source: Path,
    target: Path,
    *,
    metadata: Callable[[dict[str, str]], dict[str, str]] = dict,
    change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
) -> Path:
    """The file with its texts and tensors changed, written as an export writes it."""
    header, tensors = read_header(source), load_file(source)
    change(tensors)
    specs = [TensorSpec(name, held.dtype, tuple(tensors[name].shape)) for name, held in header.tensors.items()]
    with TensorFileWriter(target, specs, metadata(dict(header.metadata or {}))) as writer:
        for name in header.tensors:
            writer.put(name, tensors[name])
    return target


def _forged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Changed rows under a provenance and digests that were all computed anew."""
    _rewrite(source, target, change=change)
    header = read_header(target)
    specs = [TensorSpec(name, held.dtype, held.shape) for name, held in header.tensors.items()]
    head = header_bytes(specs, {ARTIFACT: (header.metadata or {})[ARTIFACT]})
    artifact = hashlib.sha256(head + target.read_bytes()[header.data_begin :]).hexdigest()
    target.unlink()
    return _rewrite(source, target, metadata=lambda texts: _told(texts, artifact=artifact), change=change)


def _told(texts: Mapping[str, str], **fields: Any) -> dict[str, str]:
    """The texts with fields of the provenance replaced and its digest computed anew."""
    told = canonical(json.loads(texts[PROVENANCE]) | fields).decode()
    return {**texts, PROVENANCE: told, PROVENANCE_DIGEST: hashlib.sha256(told.encode()).hexdigest()}


def _first(tensors: Mapping[str, torch.Tensor], what: str) -> torch.Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith(f"/{what}"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_no_byte_of_a_patch_file_can_change_unnoticed(target: Scenario, exported: Path, data: st.DataObject) -> None:
    content = exported.read_bytes()
    begin = read_header(exported).data_begin
    place = data.draw(st.one_of(st.integers(0, begin - 1), st.integers(begin, len(content) - 1)))
    flipped = bytearray(content)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = exported.with_name("flipped.patch")
    damaged.write_bytes(flipped)
    before = digests(target.working), target.states(), target.workspace.store.list()
    with pytest.raises(NeuronLedgerError, match=r"flipped\.patch"):
        import_patch(target.workspace, "line", damaged)
    assert (digests(target.working), target.states(), target.workspace.store.list()) == before


def _cut(content: bytes) -> bytes:
    return content[:-5]


def _padded(content: bytes) -> bytes:
    """A header of the same meaning with other white space."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", length + 8) + content[8 : 8 + length] + b" " * 8 + content[8 + length :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (_cut, "bytes"),
    "longer": (lambda content: content + b"\0", "belong to no tensor"),
    "padded": (_padded, "header .* is not as an export writes it"),
    "empty": (lambda _: b"", "bytes"),
    "text": (lambda _: b"not a patch at all, only words", "damaged.patch"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused(target: Scenario, exported: Path, case: str) -> None:
    damage, match = DAMAGE[case]
    damaged = exported.with_name("damaged.patch")
    damaged.write_bytes(damage(exported.read_bytes()))
    _require_refused(target, damaged, (PatchFileError, CheckpointError), match)


EDITS: dict[str, tuple[Callable[[dict[str, str]], dict[str, str]], str]] = {
    "provenance": (lambda texts: texts | {PROVENANCE: texts[PROVENANCE].replace("tester", "taster")}, "was changed"),
    "no digest": (lambda texts: {n: t for n, t in texts.items() if n != PROVENANCE_DIGEST}, "was changed"),
    "no provenance": (lambda texts: {ARTIFACT: texts[ARTIFACT]}, "is not an exported patch"),
    "more": (lambda texts: texts | {"more": "than that"}, "is not as an export writes it"),
    "artifact's header": (
        lambda texts: texts | {ARTIFACT: texts[ARTIFACT].replace("animals", "kittens")},
        "was changed: its rows",
    ),
    "artifact's form": (lambda texts: texts | {ARTIFACT: texts[ARTIFACT].replace("checkpoint", "adapter")}, "form"),
    "artifact's rows": (
        lambda texts: texts | {ARTIFACT: texts[ARTIFACT].replace('"rows": ', '"rows": 1')},
        "not those that its header describes",
    ),
    "artifact's types": (
        lambda texts: texts | {ARTIFACT: texts[ARTIFACT].replace('"extension": 0', '"extension": "0"')},
        "is not valid",
    ),
    "artifact's version": (
        lambda texts: texts | {ARTIFACT: texts[ARTIFACT].replace('"version": 1', '"version": 9')},
        "version 1",
    ),
    "newer": (lambda texts: _told(texts, version=2), "Upgrade neuronledger"),
    "other rows": (lambda texts: _told(texts, neurons_modified=1), "contradicts itself: its number of rows"),
    "other method": (lambda texts: _told(texts, method="nlsr"), "contradicts itself: its method"),
    "nul": (lambda texts: _told(texts, reason="a\0b"), "is not as an export writes it"),
    "no number": (lambda texts: _told(texts, patch=0), "is not valid: patch"),
    "long name": (lambda texts: _told(texts, lineage="x" * 256), "is not valid: lineage"),
    "unknown field": (lambda texts: _told(texts, more=1), "is not valid: more"),
    "other settings": (
        lambda texts: _told(
            texts,
            identification=json.loads(texts[PROVENANCE])["identification"] | {"settings": {"score": "random"}},
        ),
        "settings do not have their digest",
    ),
    "artifact's digest": (lambda texts: _told(texts, artifact="0" * 64), "was changed: its rows have the SHA-256"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_header_is_refused(target: Scenario, exported: Path, case: str) -> None:
    edit, match = EDITS[case]
    edited = _rewrite(exported, exported.with_name("edited.patch"), metadata=edit)
    _require_refused(target, edited, (PatchFileError, InputError), match)


def _other_old(tensors: dict[str, torch.Tensor]) -> None:
    _first(tensors, "old")[0, 0] += 1


def _negative_zero(tensors: dict[str, torch.Tensor]) -> None:
    old = _first(tensors, "old")
    old[0, 0] = -old[0, 0]


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    _first(tensors, "new")[-1, 0] = torch.nan


def _outside(tensors: dict[str, torch.Tensor]) -> None:
    _first(tensors, "rows")[-1] = 10_000


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    rows = _first(tensors, "rows")
    rows[1] = rows[0]


FORGERIES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], type[Exception], str]] = {
    "old rows": (_other_old, PatchFileError, "is not the subject's in the exported patch"),
    "sign": (_negative_zero, PatchFileError, "is not the subject's in the exported patch"),
    "not a number": (_not_a_number, NonFiniteError, "holds NaN or infinity"),
    "row outside": (_outside, PatchFileError, "are not ascending rows of its"),
    "row twice": (_twice, PatchFileError, "are not ascending rows of its"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_rows_that_cannot_be_are_refused_even_with_digests_computed_anew(
    target: Scenario, exported: Path, case: str
) -> None:
    change, error, match = FORGERIES[case]
    _require_refused(target, _forged(exported, exported.with_name("forged.patch"), change), error, match)


def test_a_forged_file_does_not_have_the_sha256_that_the_export_told(target: Scenario, exported: Path) -> None:
    """New rows that are plausible and consistent: only the digest from elsewhere tells."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        _first(tensors, "new")[0, 0] += 1

    forged = _forged(exported, exported.with_name("forged.patch"), change)
    _require_refused(target, forged, PatchFileError, "not the one that was asked for", sha256=_sha256(exported))
    assert import_patch(target.workspace, "line", exported, sha256=_sha256(exported).upper()).state == "applied"


def test_another_subject_is_refused(
    scenarios: Scenarios, exported: Path, trios: Trios, adapter_trios: Trios, tmp_path: Path
) -> None:
    full = trios()
    other = save_variant(full.aligned, tmp_path / "other", seed=9)
    for trio, match in (
        (Trio(other, full.aligned, full.base), "weights have the digest"),
        (trios(dtype=torch.bfloat16), "weights have the digest"),
        (adapter_trios(on_aligned=True), "is of the kind adapter"),
    ):
        _require_refused(scenarios(trio), exported, MismatchError, match)


def test_an_adapter_on_another_checkpoint_is_refused(
    scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path
) -> None:
    """The adapter's own digest does not know of the weights below it."""
    trio = adapter_trios(on_aligned=False)
    source = scenarios(trio)
    source.apply("animals")
    below = save_variant(trio.base, tmp_path / "below", seed=7)
    target = scenarios(Trio(trio.subject, trio.aligned, below, below))
    file = _export(source, tmp_path / "animals.patch")
    _require_refused(target, file, MismatchError, "^base of lineage line is not base, which .* was made for")


def test_digests_of_different_algorithms_are_not_taken_for_different_weights(
    scenario: Scenario, target: Scenario, exported: Path
) -> None:
    def older(texts: dict[str, str]) -> dict[str, str]:
        told = json.loads(texts[PROVENANCE])["subject"]
        held = json.loads(texts[ARTIFACT]) | {"subject_digest": "0" * 64}
        subject = told | {"digest_algorithms": ["sha256"], "state_digest": "0" * 64}
        return _told(texts | {ARTIFACT: json.dumps(held, sort_keys=True)}, subject=subject)

    file = _rewrite(exported, exported.with_name("older.patch"), metadata=older)
    _require_refused(target, file, MismatchError, "Register the older of the two again")


def test_a_protected_row_is_refused_with_the_patch_that_holds_it(target: Scenario, exported: Path) -> None:
    target.apply("weapons")
    target.apply("animals", budget=0.3)
    held = target.claims()
    artifact = open_patch_file(exported).artifact
    module = artifact.modules[0].name
    rows = load_file(exported)[f"{module}/rows"].tolist()
    row = next(row for row in rows if row in held[module])
    match = rf"neuron {row} of {module} is protected by patch {held[module][row]} of lineage line"
    _require_refused(target, exported, NeuronProtectedError, match.replace(".", r"\."))


def test_a_patch_is_not_imported_twice(target: Scenario, exported: Path) -> None:
    import_patch(target.workspace, "line", exported)
    _require_refused(target, exported, NeuronProtectedError, "is protected by patch 1 of lineage line")
    target.revert()
    assert import_patch(target.workspace, "line", exported).patch == 2
    target.require_sound()


def test_the_dimension_is_there_or_named(
    scenario: Scenario, sqlite_workspace: Workspace, exported: Path, prompts: Path, tmp_path: Path
) -> None:
    register_trio(sqlite_workspace, scenario.trio)
    register_dimensions(sqlite_workspace, prompts, ["weapons"])
    create_lineage(sqlite_workspace, "line", subject="subject", aligned="aligned", base="base")
    target = Scenario(sqlite_workspace, scenario.trio)
    _require_refused(
        target, exported, RecordNotFoundError, "neuronledger dimension register animals.* --dimension NAME"
    )
    _require_refused(target, exported, RecordNotFoundError, "no dimension named 'weapon'", dimension="weapon")
    summary = import_patch(sqlite_workspace, "line", exported, dimension="weapons")
    assert summary.dimension == "weapons"
    assert summary.origin is not None
    assert summary.origin.dimension == "animals"
    target.require_sound()


def test_a_changed_working_checkpoint_is_refused(target: Scenario, exported: Path) -> None:
    weights = target.working / "model.safetensors"
    header = read_header(weights)
    module = open_patch_file(exported).artifact.modules[0]
    flip_byte(weights, header.tensors[module.tensor].begin)
    _require_refused(target, exported, NeuronLedgerError, "is not what was recorded")


@pytest.mark.parametrize(("operation", "code"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_failing_disk_leaves_the_version_before_an_import(
    target: Scenario, exported: Path, operation: Operation, code: int
) -> None:
    before = digests(target.working)
    fault = Fault(target.working, operation, 1, error=OSError(code, "no"), torn=operation == "pwrite")
    with struck_by(fault), pytest.raises(OSError, match="no"):
        import_patch(target.workspace, "line", exported)
    assert digests(target.working) == before
    assert (target.states(), target.claims()) == (["rejected"], {})
    target.require_sound()
    assert import_patch(target.workspace, "line", exported).state == "applied"
    target.require_sound()


def test_an_import_that_was_killed_is_taken_back(target: Scenario, exported: Path) -> None:
    before = digests(target.working)
    fault = Fault(target.working, "pwrite", 2, error=KeyboardInterrupt(), torn=True)
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        import_patch(target.workspace, "line", exported)
    assert target.states() == ["applying"]
    recover(target.workspace)
    assert digests(target.working) == before
    assert target.states() == ["rejected"]
    target.require_sound()


# --- what is not exported


def test_only_patches_that_were_applied_are_exported(scenario: Scenario, tmp_path: Path) -> None:
    plan = scenario.plan("animals")
    fault = Fault(scenario.working, "pwrite", 1, error=OSError(errno.EIO, "no"))
    with struck_by(fault), pytest.raises(OSError, match="no"):
        apply_patch(scenario.workspace, plan)
    scenario.apply("animals")
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    for sequence, error, match in (
        (1, PlanError, "patch 1 of lineage line is rejected"),
        (3, PlanError, "patch 3 of lineage line changes no row"),
        (4, RecordNotFoundError, "no patch 4"),
    ):
        with pytest.raises(error, match=match):
            export_patch(scenario.workspace, "line", sequence, place / "x.patch")
        assert scenario.events()[-1][1]["attempted"] == "patch.export"
    assert list(place.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_if_asked_to(scenario: Scenario, exported: Path, tmp_path: Path) -> None:
    first = exported.read_bytes()
    for path, match in ((exported, "exists"), (tmp_path, "is a directory"), (tmp_path / "no" / "x", "not a directory")):
        with pytest.raises(InputError, match=match):
            export_patch(scenario.workspace, "line", 1, path)
    assert exported.read_bytes() == first
    summary = export_patch(scenario.workspace, "line", 1, exported, force=True)
    assert exported.read_bytes() != first  # the ledger has grown since
    assert summary.sha256 == _sha256(exported)
    assert summary.bytes == exported.stat().st_size


def test_a_damaged_artifact_is_not_exported(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    artifact = scenario.artifact(1)
    flip_byte(artifact, artifact.stat().st_size - 3)
    with pytest.raises(ArtifactError, match="was changed"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")
    assert not (tmp_path / "x.patch").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE patch_modules SET rows = rows + 1",
        "UPDATE patches SET settings = '{}'",
        "UPDATE identifications SET settings = '{}'",
    ],
)
def test_a_patch_whose_record_was_edited_is_not_exported(scenario: Scenario, tmp_path: Path, statement: str) -> None:
    scenario.apply("animals")
    with scenario.workspace.registry.write() as session:
        session.execute(text(statement))
    with pytest.raises(PatchFileError, match="audit verify"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failing_disk_leaves_no_half_export(scenario: Scenario, tmp_path: Path, operation: Operation) -> None:
    scenario.apply("animals")
    place = tmp_path / "out"
    place.mkdir()
    with (
        struck_by(Fault(place, operation, 1, error=OSError(errno.ENOSPC, "no space"))),
        pytest.raises(SpaceError, match="no space"),
    ):
        export_patch(scenario.workspace, "line", 1, place / "x.patch")
    assert list(place.iterdir()) == []
    assert [action for action, _ in scenario.events()][-1] == "refused"
    assert "patch.exported" not in dict(scenario.events())


def test_an_export_that_cannot_be_recorded_does_not_stay(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario.apply("animals")

    def refuse(_: HeadFile) -> None:
        raise RegistryError("the head file cannot be written", "mend it")

    monkeypatch.setattr(HeadFile, "require_writable", refuse)
    with pytest.raises(RegistryError, match="head file"):
        export_patch(scenario.workspace, "line", 1, tmp_path / "x.patch")
    assert not (tmp_path / "x.patch").exists()


# --- records, report and commands


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE patches SET origin = NULL",
        "UPDATE patches SET origin = '{}'",
        "UPDATE patches SET origin = REPLACE(origin, 'tester', 'taster')",
    ],
)
def test_an_edited_origin_is_named(target: Scenario, exported: Path, statement: str) -> None:
    import_patch(target.workspace, "line", exported)
    with target.workspace.registry.write() as session:
        session.execute(text(statement))
    assert [finding.problem for finding in verify(target.workspace).findings] == [
        "what its record says of where it came from is not what the ledger says"
    ]
    assert show_patch(target.workspace, "line", 1)[0].state == "applied"


def test_an_invented_origin_is_named(scenario: Scenario, exported: Path) -> None:
    with scenario.workspace.registry.write() as session:
        lineage = queries.get_lineage(session, "line")
        queries.get_patch(session, lineage, 1).origin = open_patch_file(exported).provenance.record()
    assert len(verify(scenario.workspace).findings) == 1


@pytest.mark.parametrize("own", [False, True])
def test_the_report_shows_imported_patches(target: Scenario, exported: Path, tmp_path: Path, own: bool) -> None:
    """Alone, and before an identification that was made here and has layer gaps."""
    import_patch(target.workspace, "line", exported)
    if own:
        target.identify("weapons", preset="fgsn-paper")
    page = write_report(target.workspace, "line", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "patch 1 of lineage line (animals): applied there by tester" in page
    assert "made on</dt><dd>elsewhere, the unpatched subject there" in page
    assert "those of the place it was made" in page
    assert "animals, patch 1: no layer gaps were recorded" in page
    layers = '<th scope="col">identified for</th><th scope="col" class="n">0</th><th scope="col" class="n">1</th>'
    assert (layers in page) is own


def test_provenance_reads_back_what_it_writes(exported: Path) -> None:
    told = open_patch_file(exported).provenance
    assert Provenance.from_text(told.text(), exported) == told


def _run(scenario: Scenario, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_the_commands_take_a_patch_elsewhere(scenario: Scenario, target: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    file = str(tmp_path / "animals.patch")
    told = _run(scenario, "patch", "export", "line", "1", file)
    assert _sha256(Path(file)) in told
    assert "exists" in _run(scenario, "patch", "export", "line", "1", file, code=2)
    summary = json.loads(_run(scenario, "patch", "export", "line", "1", file, "--force", "--json"))
    assert summary["sha256"] == _sha256(Path(file))

    arguments = ("patch", "import", "line", file)
    assert "nothing was written" in _run(target, *arguments, "--dry-run")
    planned = json.loads(_run(target, *arguments, "--dry-run", "--json", "--sha256", summary["sha256"]))
    assert planned["artifact"] == summary["artifact"]
    assert target.states() == []
    assert "not the one that was asked for" in _run(target, *arguments, "--sha256", "0" * 64, code=1)
    assert "It came from patch 1 of line (animals)" in _run(target, *arguments, "--reason", "shared")
    assert "is protected by patch 1" in _run(target, *arguments, code=1)
    assert "line 1" in _run(target, "patch", "list", "line")
    assert "from" not in _run(scenario, "patch", "list", "line").splitlines()[2]
    assert json.loads(_run(target, "patch", "show", "line", "1", "--json"))["patch"]["origin"]["lineage"] == "line"
    assert "It came from" in _run(target, "patch", "show", "line", "1")
    _run(target, "audit", "verify", "--weights")
    _run(target, "patch", "revert", "line")
    assert digests(target.working) == digests(target.trio.subject)
    assert "No such file" in _run(target, "patch", "import", "line", str(tmp_path / "none"), code=2)
