"""Patch files that are damaged, edited, forged or do not fit: nothing is written, and what is wrong is named."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from algorithms.errors import CheckpointError, MismatchError, NonFiniteError
from algorithms.safetensors_files import read_header
from governance.errors import InputError, PatchFileError
from governance.lineages import create_lineage
from governance.patch_artifact import FORMAT as ARTIFACT
from governance.patch_file import PROVENANCE, PROVENANCE_DIGEST, open_patch_file
from governance.patch_import import import_patch
from governance.recovery import recover
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry.errors import NeuronProtectedError, RecordNotFoundError
from tests.governance.conftest import Scenarios, Trios
from tests.governance.exchange import export_to, first, forge, require_refused, retold, rewrite, sha256_of
from tests.governance.faults import Fault, Kind, flip_byte, struck_by
from tests.governance.scenarios import (
    Scenario,
    Trio,
    digests,
    register_dimensions,
    register_trio,
)
from tests.tiny_models import save_variant


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
    require_refused(target, damaged, (PatchFileError, CheckpointError), match)


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
    "newer": (lambda texts: retold(texts, version=2), "Upgrade neuronledger"),
    "other rows": (lambda texts: retold(texts, neurons_modified=1), "contradicts itself: its number of rows"),
    "other method": (lambda texts: retold(texts, method="nlsr"), "contradicts itself: its method"),
    "nul": (lambda texts: retold(texts, reason="a\0b"), "is not as an export writes it"),
    "no number": (lambda texts: retold(texts, patch=0), "is not valid: patch"),
    "long name": (lambda texts: retold(texts, lineage="x" * 256), "is not valid: lineage"),
    "unknown field": (lambda texts: retold(texts, more=1), "is not valid: more"),
    "other settings": (
        lambda texts: retold(
            texts,
            identification=json.loads(texts[PROVENANCE])["identification"] | {"settings": {"score": "random"}},
        ),
        "settings do not have their digest",
    ),
    "artifact's digest": (lambda texts: retold(texts, artifact="0" * 64), "was changed: its rows have the SHA-256"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_header_is_refused(target: Scenario, exported: Path, case: str) -> None:
    edit, match = EDITS[case]
    edited = rewrite(exported, exported.with_name("edited.patch"), metadata=edit)
    require_refused(target, edited, (PatchFileError, InputError), match)


def _other_old(tensors: dict[str, torch.Tensor]) -> None:
    first(tensors, "old")[0, 0] += 1


def _negative_zero(tensors: dict[str, torch.Tensor]) -> None:
    old = first(tensors, "old")
    old[0, 0] = -old[0, 0]


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    first(tensors, "new")[-1, 0] = torch.nan


def _outside(tensors: dict[str, torch.Tensor]) -> None:
    first(tensors, "rows")[-1] = 10_000


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    rows = first(tensors, "rows")
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
    require_refused(target, forge(exported, exported.with_name("forged.patch"), change), error, match)


def test_a_forged_file_does_not_have_the_sha256_that_the_exporttold(target: Scenario, exported: Path) -> None:
    """New rows that are plausible and consistent: only the digest from elsewhere tells."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        first(tensors, "new")[0, 0] += 1

    forged = forge(exported, exported.with_name("forged.patch"), change)
    require_refused(target, forged, PatchFileError, "not the one that was asked for", sha256=sha256_of(exported))
    assert import_patch(target.workspace, "line", exported, sha256=sha256_of(exported).upper()).state == "applied"


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
        require_refused(scenarios(trio), exported, MismatchError, match)


def test_an_adapter_on_another_checkpoint_is_refused(
    scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path
) -> None:
    """The adapter's own digest does not know of the weights below it."""
    trio = adapter_trios(on_aligned=False)
    source = scenarios(trio)
    source.apply("animals")
    below = save_variant(trio.base, tmp_path / "below", seed=7)
    target = scenarios(Trio(trio.subject, trio.aligned, below, below))
    file = export_to(source, tmp_path / "animals.patch")
    require_refused(target, file, MismatchError, "^base of lineage line is not base, which .* was made for")


def test_digests_of_different_algorithms_are_not_taken_for_different_weights(
    scenario: Scenario, target: Scenario, exported: Path
) -> None:
    def older(texts: dict[str, str]) -> dict[str, str]:
        told = json.loads(texts[PROVENANCE])["subject"]
        held = json.loads(texts[ARTIFACT]) | {"subject_digest": "0" * 64}
        subject = told | {"digest_algorithms": ["sha256"], "state_digest": "0" * 64}
        return retold(texts | {ARTIFACT: json.dumps(held, sort_keys=True)}, subject=subject)

    file = rewrite(exported, exported.with_name("older.patch"), metadata=older)
    require_refused(target, file, MismatchError, "Register the older of the two again")


def test_a_protected_row_is_refused_with_the_patch_that_holds_it(target: Scenario, exported: Path) -> None:
    target.apply("weapons")
    target.apply("animals", budget=0.3)
    held = target.claims()
    artifact = open_patch_file(exported).artifact
    module = artifact.modules[0].name
    rows = load_file(exported)[f"{module}/rows"].tolist()
    row = next(row for row in rows if row in held[module])
    match = rf"neuron {row} of {module} is protected by patch {held[module][row]} of lineage line"
    require_refused(target, exported, NeuronProtectedError, match.replace(".", r"\."))


def test_a_patch_is_not_imported_twice(target: Scenario, exported: Path) -> None:
    import_patch(target.workspace, "line", exported)
    require_refused(target, exported, NeuronProtectedError, "is protected by patch 1 of lineage line")
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
    require_refused(target, exported, RecordNotFoundError, "neuronledger dimension register animals.* --dimension NAME")
    require_refused(target, exported, RecordNotFoundError, "no dimension named 'weapon'", dimension="weapon")
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
    require_refused(target, exported, NeuronLedgerError, "is not what was recorded")


@pytest.mark.parametrize(("kind", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_failing_disk_leaves_the_version_before_an_import(
    target: Scenario, exported: Path, kind: Kind, code: int
) -> None:
    before = digests(target.working)
    fault = Fault(target.working, kind, 1, OSError(code, "no"))
    with struck_by(fault), pytest.raises(OSError, match="no"):
        import_patch(target.workspace, "line", exported)
    assert digests(target.working) == before
    assert (target.states(), target.claims()) == (["rejected"], {})
    target.require_sound()
    assert import_patch(target.workspace, "line", exported).state == "applied"
    target.require_sound()


def test_an_import_that_was_killed_is_taken_back(target: Scenario, exported: Path) -> None:
    before = digests(target.working)
    fault = Fault(target.working, "write", 2, KeyboardInterrupt())
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        import_patch(target.workspace, "line", exported)
    assert target.states() == ["applying"]
    recover(target.workspace)
    assert digests(target.working) == before
    assert target.states() == ["rejected"]
    target.require_sound()
