"""Patches as adapters: PEFT, with the patch's adapter on its base, computes the patched weights."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from algorithms.adapters import Adapter
from cli import main
from governance import adapter_export
from governance.adapter_export import AdapterExportSummary, export_adapter
from governance.errors import InputError, PlanError, SpaceError, WeightsChangedError
from governance.patch_artifact import ArtifactModule
from registry.errors import RegistryError
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import Fault, struck_by
from tests.governance.scenarios import Scenario, Trio
from tests.tiny_models import load_model, merged_model, quiet, save_adapter

TOLERANCE = 1e-6  # of a row's norm, in float32
FULL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"dtype": torch.bfloat16}),
    ("gpt2", {}),
    ("phi3", {}),
]
ADAPTERS: list[dict[str, Any]] = [
    {"on_aligned": True},
    {"on_aligned": False},
    {"on_aligned": False, "use_rslora": True, "rank": 6, "alpha": 7},
    {"on_aligned": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    {"on_aligned": False, "dtype": torch.bfloat16},
    {"on_aligned": True, "targets": ["q_proj", "down_proj"]},
]


def _export(scenario: Scenario, directory: Path, sequence: int = 1, **options: Any) -> AdapterExportSummary:
    return export_adapter(scenario.workspace, "line", sequence, directory, **options)


def _with_adapters(base: Path, *adapters: Path) -> Any:
    """The base with all adapters active at once, as PEFT loads them."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    with quiet():
        model = peft.PeftModel.from_pretrained(load_model(base), adapters[0], adapter_name=names[0])
        for name, adapter in list(zip(names, adapters, strict=True))[1:]:
            model.load_adapter(adapter, adapter_name=name)
        model.base_model.set_adapter(names)
        return model.eval()


def _require_same_weights(model: Any, expected: Any) -> None:
    """The merged weights are the expected ones, row by row to a millionth of the row."""
    with quiet():
        merged = model.merge_and_unload(adapter_names=list(model.peft_config))
    found, wanted = merged.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        difference = (found[name].double() - weight.double()).flatten(1 if weight.dim() > 1 else 0)
        size = weight.double().flatten(1 if weight.dim() > 1 else 0)
        assert bool((difference.norm(dim=-1) <= TOLERANCE * size.norm(dim=-1)).all()), name


@pytest.mark.parametrize(("family", "form"), FULL, ids=str)
def test_a_patch_of_a_full_subject_is_an_adapter_on_the_subject(
    scenarios: Scenarios, trios: Trios, tmp_path: Path, family: str, form: dict[str, Any]
) -> None:
    scenario = scenarios(trios(family, **form))
    applied = scenario.apply("animals")
    summary = _export(scenario, tmp_path / "patch")
    model = _with_adapters(scenario.trio.subject, tmp_path / "patch")
    tokens = torch.tensor([[4, 5, 6, 7]])
    expected = load_model(scenario.working)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, atol=1e-4, rtol=1e-4)
    _require_same_weights(model, expected)

    read = Adapter.open(tmp_path / "patch")
    assert {name: module.rank for name, module in read.modules.items()} == {
        name: len(rows) for name, rows in scenario.artifact_rows(1).items()
    }
    assert {module.scale for module in read.modules.values()} == {1.0}
    assert summary.largest_rank == max(module.rank for module in read.modules.values())
    assert (summary.rows, summary.modules) == (applied.neurons_modified, applied.modules)
    assert summary.base == read.base_model == str(scenario.trio.subject)
    assert read.config["fan_in_fan_out"] is (family == "gpt2")


@pytest.mark.parametrize("form", ADAPTERS, ids=str)
def test_a_patch_of_an_adapter_is_an_adapter_beside_it(
    scenarios: Scenarios, adapter_trios: Trios, tmp_path: Path, form: dict[str, Any]
) -> None:
    """Two patches, each exported alone: with the subject's adapter they make the working adapter's weights."""
    scenario = scenarios(adapter_trios(**form))
    trio = scenario.trio
    scenario.apply("animals")
    after_first = merged_model(trio.checkpoint, scenario.working)
    scenario.apply("weapons", seed=5, budget=0.2)
    for number in (1, 2):
        _export(scenario, tmp_path / str(number), number)
    _require_same_weights(_with_adapters(trio.checkpoint, trio.subject, tmp_path / "1"), after_first)
    both = _with_adapters(trio.checkpoint, trio.subject, tmp_path / "1", tmp_path / "2")
    _require_same_weights(both, merged_model(trio.checkpoint, scenario.working))

    subject, read = Adapter.open(trio.subject), Adapter.open(tmp_path / "1")
    assert read.modules.keys() == scenario.artifact_rows(1).keys()
    assert all(module.scale == subject.modules[name].scale for name, module in read.modules.items())
    assert read.base_model == subject.base_model
    grown = {module.rank - subject.modules[name].rank for name, module in read.modules.items()}
    assert (grown == {0}) is form["on_aligned"]


def test_rows_that_kept_their_bytes_cost_no_rank(scenarios: Scenarios, trios: Trios, tmp_path: Path) -> None:
    scenario = scenarios(trios(dtype=torch.bfloat16))
    applied = scenario.apply("animals", strength=1e-4)
    assert 0 < applied.rows_unchanged < applied.neurons_modified
    _export(scenario, tmp_path / "patch")
    ranks = [module.rank for module in Adapter.open(tmp_path / "patch").modules.values()]
    assert sum(ranks) == applied.neurons_modified - applied.rows_unchanged


def test_a_patch_that_changes_no_entry_makes_no_adapter(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals", operation="restore", strength=0.0)
    with pytest.raises(PlanError, match="changes no entry"):
        _export(scenario, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_the_export_is_recorded_and_carries_its_provenance(lora_scenario: Scenario, tmp_path: Path) -> None:
    lora_scenario.apply("animals")
    lora_scenario.revert()
    summary = _export(lora_scenario, tmp_path / "patch")
    action, payload = lora_scenario.events()[-1]
    assert action == "patch.exported"
    assert payload["files"]["adapter_model.safetensors"] == summary.sha256
    assert set(payload["files"]) == {path.name for path in (tmp_path / "patch").iterdir()}
    content = (tmp_path / "patch" / "adapter_model.safetensors").read_bytes()
    assert b"neuronledger-provenance" in content
    assert {tensor.dtype for tensor in load_file(tmp_path / "patch" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    lora_scenario.require_sound()


def test_a_directory_that_holds_something_is_kept(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    scenario.apply("weapons")
    directory = tmp_path / "patch"
    _export(scenario, directory)
    with pytest.raises(InputError, match="holds an adapter"):
        _export(scenario, directory, 2)
    _export(scenario, directory, 2, force=True)
    assert Adapter.open(directory).modules.keys() == scenario.artifact_rows(2).keys()
    (directory / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match=r"holds notes\.txt"):
            _export(scenario, directory, force=force)
    with pytest.raises(InputError, match="is a file"):
        _export(scenario, directory / "notes.txt")


def test_a_changed_subject_is_refused(scenarios: Scenarios, trios: Trios, adapter_trios: Trios, tmp_path: Path) -> None:
    trio = adapter_trios(on_aligned=False)
    own = Trio(Path(shutil.copytree(trio.subject, tmp_path / "own")), trio.aligned, trio.base, trio.checkpoint)
    scenario = scenarios(own)
    scenario.apply("animals")
    save_adapter(trio.base, own.subject, seed=99)
    with pytest.raises(WeightsChangedError, match="not what was registered"):
        _export(scenario, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_modules_stored_both_ways_are_refused_by_name() -> None:
    """No family mixes them today, so the header of an artifact is made up."""

    class Mixed:
        modules = tuple(
            ArtifactModule(name, f"{name}.weight", "F32", 1, 4, 0, 4, transposed)
            for name, transposed in (("first", True), ("second", False))
        )

    with pytest.raises(PlanError, match=r"first is stored as \(in, out\) and second as \(out, in\)"):
        adapter_export._transposed(Mixed())  # type: ignore[arg-type]


def test_wherever_the_disk_fails_no_half_adapter_is_left(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    directory = tmp_path / "patch"
    with struck_by(Fault(directory)) as counted:
        _export(scenario, directory)
    turns = [n for n, name in enumerate(counted.points, start=1) if not name.startswith("write")]
    for at in (*turns, 2, 3):
        if directory.exists():
            shutil.rmtree(directory)
        fault = Fault(directory, None, at, OSError(errno.ENOSPC, "No space left on device"))
        with struck_by(fault), pytest.raises((SpaceError, RegistryError), match=r"space|full"):
            _export(scenario, directory)
        assert fault.struck
        assert not directory.exists()
    assert _export(scenario, directory).modules > 0
    scenario.require_sound()


def test_the_command_tells_how_large_the_rank_gets(scenario: Scenario, tmp_path: Path) -> None:
    scenario.apply("animals")
    arguments = ["patch", "export", "line", "1", str(tmp_path / "patch"), "--as-adapter"]
    arguments += ["--database", scenario.workspace.registry.url]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    assert "largest rank" in told.stdout
    again = CliRunner().invoke(main, [*arguments, "--force", "--json"])
    assert json.loads(again.stdout)["largest_rank"] > 0
