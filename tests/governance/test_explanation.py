"""`audit explain`: every changed byte is in a row that an applied patch wrote, or it is named with its place."""

import errno
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from algorithms.adapters import Adapter
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.safetensors_files import read_header
from cli import main
from governance import row_files
from governance.explanation import Explanation, explain
from governance.patching import apply_patch
from governance.recovery import recover
from governance.weight_differences import SHOWN, Difference
from governance.workspace import Workspace
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, struck_by
from tests.governance.patched_lineages import PatchedLineage, change_records, invert, overwrite, patched_lineage
from tests.governance.scenarios import Scenario, Trio, build, digests

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def full_lineage(
    tmp_path_factory: pytest.TempPathFactory, registered: Callable[[Trio], Path], trios: Trios
) -> Iterator[PatchedLineage]:
    with patched_lineage(tmp_path_factory.mktemp("full"), registered, trios()) as patched:
        yield patched


@pytest.fixture(scope="module")
def lora_lineage(
    tmp_path_factory: pytest.TempPathFactory, registered: Callable[[Trio], Path], adapter_trios: Trios
) -> Iterator[PatchedLineage]:
    with patched_lineage(tmp_path_factory.mktemp("lora"), registered, adapter_trios(on_aligned=False)) as patched:
        yield patched


@pytest.fixture
def full(full_lineage: PatchedLineage) -> Iterator[PatchedLineage]:
    """A patched full checkpoint to damage."""
    yield full_lineage
    full_lineage.restore()


@pytest.fixture
def lora(lora_lineage: PatchedLineage) -> Iterator[PatchedLineage]:
    """A patched LoRA adapter to damage."""
    yield lora_lineage
    lora_lineage.restore()


def _explain(patched: PatchedLineage) -> Explanation:
    return explain(patched.scenario.workspace, "line")


def _stored(patched: PatchedLineage, tensor: str) -> tuple[Path, StoredTensor]:
    stored = (Adapter if patched.scenario.trio.checkpoint else Checkpoint).open(patched.working).tensors[tensor]
    return patched.working / stored.file, stored


def _invert_row(patched: PatchedLineage, tensor: str, row: int) -> None:
    path, stored = _stored(patched, tensor)
    begin = stored.begin + row * stored.row_bytes
    invert(path, begin, begin + stored.row_bytes)


def _free_row(patched: PatchedLineage, module: str) -> int:
    claimed = patched.scenario.claims().get(module, {})
    return next(row for row in range(16) if row not in claimed)


def _claimed_row(patched: PatchedLineage, module: str) -> tuple[int, int]:
    """A claimed row of a module and the patch that claims it."""
    return next(iter(patched.scenario.claims()[module].items()))


def _require_unexplained(patched: PatchedLineage, *named: str) -> list[dict[str, Any]]:
    """The command exits with 1, names each thing on stderr and in JSON; the findings as JSON has them."""
    result = patched.run("audit", "explain", "line")
    assert (result.exit_code, "Every change is explained" in result.output) == (1, False), result.output
    assert "not every change is explained by an applied patch." in result.stderr.splitlines()[-1]
    for name in named:
        assert name in result.stderr
    told = patched.run("audit", "explain", "line", "--json")
    assert (told.exit_code, told.stderr) == (1, "")
    content = json.loads(told.stdout)
    assert content["explained"] is False
    assert result.stderr.count("UNEXPLAINED") == len(content["findings"])
    findings: list[dict[str, Any]] = content["findings"]
    return findings


def _require_explained(patched: PatchedLineage) -> None:
    result = patched.run("audit", "explain", "line")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("Every change is explained by an applied patch.\n")


@pytest.mark.parametrize("block_bytes", [8 * 2**20, 300])
def test_every_change_is_attributed_to_the_patch_that_claims_it(
    patched_forms: PatchedLineage, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "BLOCK_BYTES", block_bytes)
    scenario = patched_forms.scenario
    outcome = _explain(patched_forms)
    assert outcome.findings == ()
    claims = scenario.claims()
    owners = [patch for neurons in claims.values() for patch in neurons.values()]
    assert [patch.patch for patch in outcome.patches] == [1, 3]
    for patch in outcome.patches:
        assert patch.rows == patch.as_written == owners.count(patch.patch) > 0
        assert patch.modules == sum(patch.patch in neurons.values() for neurons in claims.values())
        assert (patch.changed + patch.unchanged, patch.unread) == (patch.rows, 0)
        assert patch.unchanged == scenario.patch(patch.patch).rows_unchanged
    assert outcome.rows_changed == outcome.rows_attributed
    assert outcome.rows_changed == sum(patch.changed + patch.appended for patch in outcome.patches)
    total = sum(path.stat().st_size for path in patched_forms.working.iterdir())
    assert (outcome.bytes_compared, outcome.files_compared) == (total, len(list(patched_forms.working.iterdir())))
    _require_explained(patched_forms)


def test_nothing_changed_without_patches_and_after_the_last_was_taken_back(scenarios: Scenarios, trios: Trios) -> None:
    scenario = scenarios(trios())
    for _ in range(2):
        outcome = explain(scenario.workspace, "line")
        assert (outcome.patches, outcome.rows_changed, outcome.findings) == ((), 0, ())
        scenario.apply("animals")
        assert explain(scenario.workspace, "line").rows_changed > 0
        scenario.revert()


def test_rows_whose_change_was_lost_in_rounding_are_counted(scenarios: Scenarios, trios: Trios) -> None:
    scenario = scenarios(trios(dtype=torch.bfloat16))
    summary = scenario.apply("animals", score="random", budget=1.0, strength=0.002)
    assert 0 < summary.rows_unchanged < summary.neurons_modified
    (patch,) = explain(scenario.workspace, "line").patches
    assert (patch.rows, patch.unchanged) == (summary.neurons_modified, summary.rows_unchanged)
    assert patch.as_written == patch.rows


def test_appended_rows_of_lora_a_are_the_patches_that_appended_them(lora: PatchedLineage) -> None:
    before = Adapter.open(lora.scenario.trio.subject).modules
    after = Adapter.open(lora.working).modules
    grown = {name for name in after if after[name].rank > before[name].rank}
    first = {name for name, neurons in lora.scenario.claims().items() if 1 in neurons.values()}
    outcome = _explain(lora)
    assert [patch.appended for patch in outcome.patches] == [3 * len(first), 3 * len(grown - first)]
    assert sum(patch.appended for patch in outcome.patches) > 0
    assert "rows added to lora_A" in lora.run("audit", "explain", "line").stdout


def test_an_unclaimed_row_written_by_hand_is_named(full: PatchedLineage) -> None:
    """The file's size and times are as recorded: nothing but its bytes tells."""
    row = _free_row(full, UP)
    _invert_row(full, f"{UP}.weight", row)
    assert full.run("audit", "verify").exit_code == 0
    (finding,) = _require_unexplained(full, f"model.safetensors, tensor {UP}.weight, row {row}: changed")
    assert (finding["kind"], finding["tensor"], finding["module"]) == ("unclaimed", f"{UP}.weight", UP)
    assert (finding["rows"], finding["count"], finding["unit"]) == ([row], 1, "row")


def test_a_claimed_row_written_by_hand_is_named_with_its_patch(full: PatchedLineage) -> None:
    row, patch = _claimed_row(full, UP)
    _invert_row(full, f"{UP}.weight", row)
    (finding,) = _require_unexplained(full, f"{UP}.weight, row {row}: claimed by patch {patch}, but not the bytes")
    assert (finding["kind"], finding["patch"]) == ("claimed", patch)
    outcome = _explain(full)
    assert {patch.patch: patch.rows - patch.as_written for patch in outcome.patches}[patch] == 1
    assert outcome.rows_changed - outcome.rows_attributed == 1


def test_a_claimed_row_that_is_the_subjects_again_is_named(full: PatchedLineage) -> None:
    row, patch = _claimed_row(full, UP)
    path, stored = _stored(full, f"{UP}.weight")
    begin = stored.begin + row * stored.row_bytes
    original = (full.scenario.trio.subject / stored.file).read_bytes()
    overwrite(path, begin, original[begin : begin + stored.row_bytes])
    _require_unexplained(full, f"{UP}.weight, row {row}: claimed by patch {patch}")


def test_rows_of_embeddings_and_elements_of_norms_are_named(full: PatchedLineage) -> None:
    _invert_row(full, "model.embed_tokens.weight", 5)
    _invert_row(full, "model.norm.weight", 9)
    _require_unexplained(
        full, "tensor model.embed_tokens.weight, row 5: changed", "tensor model.norm.weight, element 9: changed"
    )


def test_more_rows_than_are_listed_are_counted(full: PatchedLineage) -> None:
    path, stored = _stored(full, "model.embed_tokens.weight")
    invert(path, stored.begin, stored.end)
    (finding,) = _require_unexplained(full, f"19 and {stored.shape[0] - SHOWN} more: changed")
    assert (finding["rows"], finding["count"]) == (list(range(SHOWN)), stored.shape[0])


def test_of_a_module_that_is_stored_transposed_the_neuron_is_named(
    tmp_path: Path, registered: Callable[[Trio], Path], trios: Trios
) -> None:
    with patched_lineage(tmp_path, registered, trios(family="gpt2")) as patched:
        claims = patched.scenario.claims()
        module, (claimed, patch) = next((name, next(iter(neurons.items()))) for name, neurons in claims.items())
        path, stored = _stored(patched, f"{module}.weight")
        free = next(column for column in range(stored.shape[1]) if column not in claims[module])
        for column in (claimed, free):
            invert(
                path,
                stored.begin + 2 * stored.row_bytes + 4 * column,
                stored.begin + 2 * stored.row_bytes + 4 * column + 1,
            )
        _require_unexplained(
            patched,
            f"tensor {module}.weight, neuron {free}: changed, and claimed by no applied patch",
            f"tensor {module}.weight, neuron {claimed}: claimed by patch {patch}",
        )
        path.write_bytes(path.read_bytes()[: stored.begin + stored.row_bytes])
        _require_unexplained(patched, f"{module}.weight, neurons 0, 1", "missing: the file ends before")


def _in_config(working: Path) -> None:
    content = json.loads((working / "config.json").read_text())
    (working / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 0.5}))


def _added(working: Path) -> None:
    (working / "pytorch_model.bin").write_bytes(b"x")
    (working / ".hidden").write_bytes(b"x")
    (working / "more").mkdir()
    (working / "more" / "weights.safetensors").write_bytes(b"x")


def _link(working: Path) -> None:
    (working / "tokenizer.json").unlink()
    (working / "tokenizer.json").symlink_to(working / "nowhere")


PLAIN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "another value": (_in_config, ("config.json: differs from byte", "(rms_norm_eps)")),
    "other white space": (
        lambda w: (w / "config.json").write_text(json.dumps(json.loads((w / "config.json").read_text()))),
        ("config.json: differs", "same content, written differently"),
    ),
    "something after the end": (lambda w: (w / "config.json").open("a").write(" "), ("config.json: has 1 bytes more",)),
    "cut off": (
        lambda w: (w / "tokenizer.json").write_bytes((w / "tokenizer.json").read_bytes()[:9]),
        ("tokenizer.json: differs from byte 9 on",),
    ),
    "gone": (lambda w: (w / "tokenizer_config.json").unlink(), ("tokenizer_config.json: is missing",)),
    "added": (_added, ("pytorch_model.bin: was added", ".hidden: was added", "more/weights.safetensors: was added")),
    "a link to nowhere": (_link, ("tokenizer.json: is not a regular file",)),
    "a directory": (
        lambda w: ((w / "config.json").unlink(), (w / "config.json").mkdir()),
        ("config.json: is missing",),
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_files_that_hold_no_weights_are_compared_too(full: PatchedLineage, case: str) -> None:
    damage, named = PLAIN[case]
    damage(full.working)
    findings = _require_unexplained(full, *named)
    assert {finding["kind"] for finding in findings} == {"file"}
    assert len(findings) == len([name for name in named if ": " in name])


def _weights(working: Path) -> Path:
    return working / "model.safetensors"


def _cut(size: int) -> Callable[[Path], None]:
    def cut(working: Path) -> None:
        _weights(working).write_bytes(_weights(working).read_bytes()[:size])

    return cut


def _save_changed(change: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str]) -> Callable[[Path], None]:
    def save(working: Path) -> None:
        tensors = load_file(_weights(working))
        change(tensors)
        save_file(tensors, _weights(working), metadata)

    return save


def _fifo(working: Path) -> None:
    _weights(working).unlink()
    _weights(working).mkdir()


def _wider_header(working: Path) -> None:
    content = _weights(working).read_bytes()
    length = int.from_bytes(content[:8], "little")
    _weights(working).write_bytes(
        (length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :]
    )


FORMAT = {"format": "pt"}
DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], set[str]]] = {
    "missing": (lambda w: _weights(w).unlink(), ("model.safetensors: is missing",), {"file"}),
    "a directory": (_fifo, ("model.safetensors: is not a regular file",), {"file"}),
    "the whole directory": (shutil.rmtree, ("model.safetensors: is missing", "config.json: is missing"), {"file"}),
    "empty": (_cut(0), ("ends", "its header is damaged"), {"file", "header"}),
    "cut in the header": (_cut(100), ("its header is damaged",), {"file", "header"}),
    "cut in a tensor": (_cut(9000), ("bytes early, at byte 9,000", "missing: the file ends before"), {"file"}),
    "one byte short": (
        lambda w: _weights(w).write_bytes(_weights(w).read_bytes()[:-1]),
        ("ends 1 bytes early", "missing: the file ends before"),
        {"file"},
    ),
    "one byte more": (lambda w: _weights(w).open("ab").write(b"x"), ("has 1 bytes after its last",), {"file"}),
    "other metadata": (_save_changed(len, {"format": "np"}), ("__metadata__ is another (format)",), {"header"}),
    "no metadata": (_save_changed(len, {}), ("__metadata__ is another (format)",), {"header"}),
    "a wider header": (_wider_header, ("its header has other bytes, though it declares the same",), {"header"}),
    "a tensor gone": (
        _save_changed(lambda t: t.pop("model.norm.weight"), FORMAT),
        ("tensor model.norm.weight: is missing",),
        {"tensor"},
    ),
    "a tensor more": (
        _save_changed(lambda t: t.update(more=torch.zeros(2)), FORMAT),
        ("tensor more: was added",),
        {"tensor"},
    ),
    "another dtype": (
        _save_changed(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), FORMAT),
        ("tensor model.norm.weight: has dtype F16 and shape (16,), not F32 and (16,)",),
        {"tensor"},
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_weight_file_is_described_and_no_crash(full: PatchedLineage, case: str) -> None:
    damage, named, kinds = DAMAGE[case]
    damage(full.working)
    findings = _require_unexplained(full, *named)
    assert {finding["kind"] for finding in findings} == kinds


def test_a_file_that_cannot_be_read_is_a_finding(full: PatchedLineage, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path in {_weights(full.working), full.working / "tokenizer.json"}:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refusing)
    findings = _require_unexplained(
        full,
        "model.safetensors: cannot be read (Permission denied)",
        "tokenizer.json: cannot be read (Permission denied)",
    )
    assert len(findings) == 2


def test_a_disk_that_fails_while_it_is_read_is_a_finding(full: PatchedLineage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() >= 9000:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer[: 9000 - self.tell()])

    opened = Path.open
    weights = _weights(full.working)
    monkeypatch.setattr(Path, "open", lambda path, *a, **s: Failing(path) if path == weights else opened(path, *a, **s))
    (finding,) = _require_unexplained(full, "model.safetensors: cannot be read beyond byte 9,000 (Input/output error)")
    assert finding["kind"] == "file"
    assert sum(patch.unread for patch in _explain(full).patches) > 0


def test_what_a_damaged_file_still_holds_is_still_attributed(full: PatchedLineage) -> None:
    """Saved anew with other metadata, every tensor lies elsewhere; a header of nonsense hides none of them."""
    expected = _explain(full).patches
    _save_changed(len, {"format": "np"})(full.working)
    assert _explain(full).patches == expected
    full.restore()
    overwrite(_weights(full.working), 8, b"nonsense")
    outcome = _explain(full)
    assert outcome.patches == expected
    assert [finding.kind for finding in outcome.findings] == ["header"]


def test_rows_that_cannot_be_read_are_counted_as_such(full: PatchedLineage) -> None:
    rows = {patch.patch: patch.rows for patch in _explain(full).patches}
    _weights(full.working).unlink()
    outcome = _explain(full)
    assert {patch.patch: patch.unread for patch in outcome.patches} == rows
    assert all(patch.changed == patch.unchanged == patch.as_written == 0 for patch in outcome.patches)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_the_weight_files_is_named_with_its_place(
    patched_forms: PatchedLineage, data: st.DataObject
) -> None:
    """One place exactly: the row of the tensor, the neuron where rows are columns, or the header."""
    paths = sorted(patched_forms.working.glob("*.safetensors"))
    path = data.draw(st.sampled_from(paths))
    header = read_header(path)
    stored = data.draw(st.sampled_from([None, *header.tensors.values()]))
    begin, end = (0, header.data_begin) if stored is None else (stored.begin, stored.end)
    offset, flip = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(1, 255))
    original = path.read_bytes()[offset]
    overwrite(path, offset, bytes([original ^ flip]))
    try:
        findings = _explain(patched_forms).findings
    finally:
        overwrite(path, offset, bytes([original]))
    assert all(finding.file == path.name for finding in findings)
    if stored is None:
        assert findings
        assert {finding.kind for finding in findings} <= {"header", "tensor"}
        return
    (finding,) = findings
    assert (finding.tensor, finding.rows, finding.count) == (stored.name, (_place(finding, stored, offset),), 1)
    claimed = patched_forms.scenario.claims().get(finding.module or "", {}).get(finding.rows[0])
    if "lora_A" not in stored.name:
        assert (finding.kind, finding.patch) == (("claimed", claimed) if claimed else ("unclaimed", None))


def _place(finding: Difference, stored: StoredTensor, offset: int) -> int:
    inside = offset - stored.begin
    if finding.unit == "neuron":
        return inside % stored.row_bytes // (stored.row_bytes // stored.shape[1])
    return inside // stored.row_bytes


def test_a_missing_shard_is_named(tmp_path: Path, registered: Callable[[Trio], Path], trios: Trios) -> None:
    with patched_lineage(tmp_path, registered, trios(shard_size="6KB")) as patched:
        shards = sorted(path.name for path in patched.working.glob("*.safetensors"))
        assert len(shards) > 2
        (patched.working / shards[1]).unlink()
        (finding,) = _require_unexplained(patched, f"{shards[1]}: is missing")
        patched.restore()
        (patched.working / "model.safetensors.index.json").unlink()
        (finding,) = _require_unexplained(patched, "model.safetensors.index.json: is missing")
        assert finding["kind"] == "file"


LORA_A, LORA_B = (f"base_model.model.{UP}.lora_{factor}.weight" for factor in "AB")


def test_rows_of_an_adapters_factors_are_named(lora: PatchedLineage) -> None:
    free = _free_row(lora, UP)
    claimed, patch = _claimed_row(lora, UP)
    _invert_row(lora, LORA_B, free)
    _invert_row(lora, LORA_B, claimed)
    _invert_row(lora, LORA_A, 1)
    _invert_row(lora, LORA_A, 5)
    findings = _require_unexplained(
        lora,
        f"adapter_model.safetensors, tensor {LORA_B}, row {free}: changed, and claimed by no applied patch",
        f"tensor {LORA_B}, row {claimed}: claimed by patch {patch}, but not the bytes that it wrote",
        f"tensor {LORA_A}, row 1: changed, and claimed by no applied patch",
        f"tensor {LORA_A}, row 5: claimed by patch",
    )
    assert len(findings) == 4


def test_an_adapters_configuration_is_what_its_patches_compose(lora: PatchedLineage) -> None:
    content = json.loads((lora.working / "adapter_config.json").read_text())
    (lora.working / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 9}, indent=2) + "\n")
    assert len(_require_unexplained(lora, "adapter_config.json: differs from byte", "(lora_alpha)")) == 1
    lora.restore()
    shutil.copy(lora.scenario.trio.subject / "adapter_config.json", lora.working)
    _require_unexplained(lora, "adapter_config.json", "alpha_pattern, rank_pattern")


def test_a_damaged_adapter_is_described_and_no_crash(lora: PatchedLineage) -> None:
    weights = lora.working / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-50])
    _require_unexplained(lora, "ends 50 bytes early", "missing: the file ends before")
    weights.write_bytes(b"nonsense")
    _require_unexplained(lora, "its header is damaged")
    weights.unlink()
    _require_unexplained(lora, "adapter_model.safetensors: is missing")
    shutil.copy(lora.scenario.trio.subject / weights.name, weights)
    _require_unexplained(lora, f"tensor {LORA_B}: has dtype F32 and shape (24, 4), not F32 and (24, 7)")
    (lora.working / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    _require_unexplained(lora, "adapter_config.json: differs")


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_damaged_artifact_explains_nothing(form: str, scenario: Scenario, lora_scenario: Scenario) -> None:
    chosen = scenario if form == "full" else lora_scenario
    chosen.apply("animals")
    chosen.apply("weapons")
    artifact = chosen.artifact(1)
    artifact.chmod(0o600)
    artifact.write_bytes(artifact.read_bytes()[:-1])
    outcome = explain(chosen.workspace, "line")
    assert not outcome.explained
    assert (outcome.findings[0].kind, outcome.findings[0].patch) == ("artifact", 1)
    assert "the rows of patch 1 cannot be checked" in str(outcome.findings[0])
    if form == "full":
        assert len(outcome.findings) == 1
        assert (outcome.patches[0].changed, outcome.patches[0].as_written) == (outcome.patches[0].rows, 0)
        assert outcome.patches[1].as_written == outcome.patches[1].rows
        assert outcome.rows_attributed == outcome.patches[1].changed
    else:
        named = {finding.file for finding in outcome.findings if "not compared" in finding.problem}
        assert named == {"adapter_model.safetensors", "adapter_config.json"}


def test_claims_that_the_artifact_does_not_bear_out_are_named(scenario: Scenario) -> None:
    scenario.apply("animals", score="random", budget=0.3)
    module, neurons = next((name, sorted(rows)) for name, rows in scenario.claims().items() if len(rows) < 16)
    free = next(row for row in range(16) if row not in neurons)
    number = f"(SELECT id FROM model_modules WHERE name = '{module}' AND model_id = (SELECT subject_id FROM lineages))"
    change_records(
        scenario, f"UPDATE protected_neurons SET neuron = {free} WHERE module_id = {number} AND neuron = {neurons[0]}"
    )
    told = [str(finding) for finding in explain(scenario.workspace, "line").findings]
    assert any(f"row {neurons[0]}: changed, and claimed by no applied patch" in line for line in told)
    assert any(f"row {neurons[0]}: in the artifact of patch 1, but not claimed by it" in line for line in told)
    assert any(f"row {free}: claimed by patch 1, but not in its artifact" in line for line in told)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_an_interrupted_patch_is_said_to_need_recovery(form: str, scenario: Scenario, lora_scenario: Scenario) -> None:
    chosen = scenario if form == "full" else lora_scenario
    chosen.apply("weapons")
    plan = chosen.plan("animals", score="random", budget=0.3)
    with struck_by(Fault(chosen.working, "fsync", 1, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        apply_patch(chosen.workspace, plan)
    findings = explain(chosen.workspace, "line").findings
    assert findings[0].kind == "interrupted"
    assert "run neuronledger recover" in str(findings[0])
    if form == "full":
        assert {finding.kind for finding in findings} == {"interrupted"}
        assert sum(finding.count for finding in findings) > 0
        assert all(finding.patch == 2 for finding in findings)
    recover(chosen.workspace)
    assert explain(chosen.workspace, "line").explained


def test_an_interrupted_revert_is_said_to_need_recovery(scenario: Scenario) -> None:
    scenario.apply("weapons")
    scenario.apply("animals", score="random", budget=0.3)
    with struck_by(Fault(scenario.working, "fsync", 1, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        scenario.revert(1)
    outcome = explain(scenario.workspace, "line")
    assert {finding.kind for finding in outcome.findings} == {"interrupted"}
    assert [patch.patch for patch in outcome.patches] == [2]


def test_a_subject_that_changed_explains_nothing(
    sqlite_workspace: Workspace, tmp_path: Path, trios: Trios, prompts: Path
) -> None:
    """A file that no patch can reach may be shared with the subject, so that one write changes both."""
    trio = trios(shard_size="4KB")
    shutil.copytree(trio.subject, tmp_path / "subject")
    scenario = build(sqlite_workspace, Trio(tmp_path / "subject", trio.aligned, trio.base), prompts)
    scenario.apply("animals")
    stored = Checkpoint.open(scenario.working).stored("model.embed_tokens.weight")
    assert (scenario.working / stored.file).stat().st_nlink == 2
    overwrite(scenario.working / stored.file, stored.begin, b"changed!")
    (finding,) = explain(scenario.workspace, "line").findings
    assert (finding.kind, finding.file, finding.tensor) == ("subject", stored.file, stored.name)
    (tmp_path / "subject" / stored.file).unlink()
    result = CliRunner().invoke(main, ["audit", "explain", "line", "--database", scenario.workspace.registry.url])
    assert result.exit_code == 2
    assert str(tmp_path / "subject" / stored.file) in result.stderr


def test_explaining_writes_nothing(patched_forms: PatchedLineage) -> None:
    def state() -> Any:
        directory = patched_forms.scenario.workspace.directory
        times = {path: path.stat().st_mtime_ns for path in patched_forms.working.iterdir()}
        kept = {name: digest for name, digest in digests(directory).items() if "registry.db" not in name}
        return kept, times, patched_forms.scenario.events()

    before = state()
    _require_explained(patched_forms)
    assert state() == before


def test_an_unknown_lineage_is_an_error_and_no_finding(full: PatchedLineage) -> None:
    result = full.run("audit", "explain", "lime")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "line" in result.stderr
