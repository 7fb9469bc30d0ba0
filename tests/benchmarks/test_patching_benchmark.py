"""The patching benchmark: its checkpoints, its baselines, what it keeps and concludes. Timings are not tested."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import patching
import patching_baselines as baselines
import patching_checkpoints as checkpoints
import pytest
import torch
from patching_checkpoints import ROLES, Shape, make_checkpoints, shape_of
from patching_measure import MIB, Cost, machine, measured, warm
from patching_phases import PHASES
from patching_records import EVERY, FOURTH, LAYOUTS, LINEAGE, chosen_rows
from patching_report import Results, chain_table, projection_lines, set_up_table, verdicts
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from algorithms.checkpoints import Checkpoint
from algorithms.operations import edit_rows
from algorithms.settings import FgsnSettings
from algorithms.weights import CheckpointWeights
from governance.workspace import Workspace
from registry.database import Registry

TINY = Shape(hidden=64, intermediate=96, head=16, key_value_heads=2, vocabulary=80, blocks=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("models"), TINY, 3, lambda _: None)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", create=True) as registry:
        yield Workspace(registry=registry, actor="benchmark")


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- checkpoints ---


@pytest.mark.parametrize("size", [0.02, 0.3, 1.0, 4.0, 8.0])
def test_shapes_have_about_the_wanted_size_and_two_blocks_or_fours(size: float) -> None:
    shape = shape_of(size)
    assert shape.bytes / 1e9 == pytest.approx(size, rel=0.12)
    assert shape.blocks == 2 or shape.blocks % 4 == 0
    assert (shape.hidden == 4096) == (size >= 2)


def test_a_generated_checkpoint_is_a_llama_of_the_size_that_its_shape_says(models: dict[str, Path]) -> None:
    tensors = stored(models["subject"])
    assert sum(2 * tensor.numel() for tensor in tensors.values()) == TINY.bytes
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert len(list(models["subject"].glob("*.safetensors"))) == 5
    loaded = AutoModelForCausalLM.from_pretrained(models["subject"], dtype="auto").state_dict()
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_subject_and_base_differ_from_the_aligned_model_in_every_linear_module_only(models: dict[str, Path]) -> None:
    aligned = stored(models["aligned"])
    linear = {module.tensor for module in CheckpointWeights(Checkpoint.open(models["aligned"])).modules.values()}
    for role in ("base", "subject"):
        other = stored(models[role])
        assert {name for name in aligned if not torch.equal(aligned[name], other[name])} == linear
        outside = "model-00001-of-00005.safetensors"
        assert (models[role] / outside).samefile(models["aligned"] / outside)
    change = stored(models["subject"])["model.layers.2.mlp.up_proj.weight"].float()
    change -= aligned["model.layers.2.mlp.up_proj.weight"].float()
    assert float(change.std()) == pytest.approx(checkpoints.CHANGE_SCALE, rel=0.2)


def test_checkpoints_are_made_once_for_a_shape_and_a_seed(tmp_path: Path) -> None:
    told: list[str] = []
    first = make_checkpoints(tmp_path, TINY, 0, told.append)
    before = stored(first["base"])
    make_checkpoints(tmp_path, TINY, 0, told.append)
    assert [text.split()[0] for text in told] == ["making", "models"]
    make_checkpoints(tmp_path, TINY, 1, told.append)
    assert told[-1].startswith("making")
    assert not torch.equal(stored(first["base"])["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize(
    ("layout", "block", "blocks", "count"),
    [(EVERY, 1, 8, 5), (FOURTH, 4, 8, 20), (FOURTH, 5, 8, 0), (FOURTH, 0, 2, 10)],
)
def test_layouts_select_their_share_of_rows(layout: str, block: int, blocks: int, count: int) -> None:
    rows = chosen_rows(100, block, blocks, layout, torch.Generator().manual_seed(0))
    assert len(rows) == count == len(set(rows.tolist()))
    assert rows.tolist() == sorted(rows.tolist())


# --- phases and baselines ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ["restore", "project", "subspace"])
def test_the_phases_patch_through_the_product_and_load_and_save_gives_the_same_weights(
    workspace: Workspace, models: dict[str, Path], tmp_path: Path, layout: str, operation: str
) -> None:
    PHASES["create"](workspace)
    for role in ROLES:
        PHASES["register"](workspace, role=role, path=str(models[role]))
    PHASES["lineage"](workspace)
    number = PHASES["identify"](workspace, layout=layout, operation=operation, seed=0)["identification"]
    planned = PHASES["plan"](workspace, identification=number)
    assert planned["share"] == pytest.approx(0.05, rel=0.15)
    patch = PHASES["apply"](workspace, identification=number)["patch"]
    working = workspace.directory / "lineages" / LINEAGE
    subject, patched = stored(models["subject"]), stored(working)
    assert sum(int((subject[name] != patched[name]).any(dim=-1).sum()) for name in subject) == planned["rows"]
    target = tmp_path / "saved"
    PHASES["load+save"](workspace, patch=patch, source=str(models["subject"]), target=str(target))
    saved = stored(target)
    assert set(saved) == set(patched)
    assert all(torch.equal(saved[name], tensor) for name, tensor in patched.items())
    assert PHASES["verify"](workspace)["checked"]["tensors"] == len(subject)
    PHASES["revert"](workspace)
    assert all(torch.equal(tensor, subject[name]) for name, tensor in stored(working).items())
    PHASES["apply"](workspace, identification=number)
    PHASES["reset"](workspace)
    assert all(torch.equal(tensor, subject[name]) for name, tensor in stored(working).items())


def test_a_weight_that_was_changed_stops_the_benchmark(workspace: Workspace, models: dict[str, Path]) -> None:
    PHASES["create"](workspace)
    for role in ROLES:
        PHASES["register"](workspace, role=role, path=str(models[role]))
    PHASES["lineage"](workspace)
    file = workspace.directory / "lineages" / LINEAGE / "model-00003-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="verify found"):
        PHASES["verify"](workspace)


def test_the_copy_is_a_copy(models: dict[str, Path], tmp_path: Path) -> None:
    baselines.copy(models["subject"], tmp_path / "copy")
    original = {path.name: path.read_bytes() for path in models["subject"].iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == original


def test_the_dense_formula_gives_what_the_product_gives_for_its_rows(models: dict[str, Path]) -> None:
    sources = {role: CheckpointWeights(Checkpoint.open(models[role])) for role in ROLES}
    name = "model.layers.1.self_attn.q_proj"
    tensor = sources["subject"].modules[name].tensor
    file = sources["subject"].checkpoint.stored(tensor).file
    whole = [baselines.read_whole(models[role], file, tensor) for role in ("subject", "aligned", "base")]
    rows = torch.tensor([0, 9, 33])
    settings = FgsnSettings(operation="project")
    found = edit_rows(sources["subject"], sources["aligned"], sources["base"], name, rows, settings)
    torch.testing.assert_close(found.values, baselines.dense_projection(*whole)[rows], atol=1e-7, rtol=1e-6)


def test_projections_are_timed_on_square_modules_of_the_wanted_width(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]
) -> None:
    monkeypatch.setattr(baselines, "WIDTH", TINY.hidden)
    for figures in (
        baselines.project_rows(models["base"].parent, 0.05),
        baselines.project_dense(models["base"].parent),
    ):
        assert figures["modules"] == 2 * TINY.blocks
        assert figures["module_seconds"] > 0


# --- measuring ---


def test_bytes_and_memory_of_a_phase_are_counted(tmp_path: Path) -> None:
    def work() -> dict[str, int]:
        (tmp_path / "file").write_bytes(b"x" * 3 * MIB)
        warm([tmp_path / "file"])
        return {"answer": 42}

    cost = measured(work)
    assert cost.written >= 3 * MIB
    assert cost.read >= 3 * MIB
    assert cost.peak_memory > 50 * MIB
    assert 0 < cost.seconds < 60
    assert 0 <= cost.processor_seconds < 60
    assert cost.figures == {"answer": 42}


def test_the_machine_is_told_from_the_machine(tmp_path: Path) -> None:
    told = machine(tmp_path, 1)
    assert all(told.values())
    assert {"processor", "cores", "memory", "file system"} <= set(told)


def test_a_phase_runs_in_a_process_of_its_own_and_its_failure_is_told(tmp_path: Path) -> None:
    options = patching._options(["--directory", str(tmp_path), "--sizes", "0.02"])
    runner = patching.Runner(patching.Benchmark(options), tmp_path / "size-0.02", 0.02, TINY)
    assert runner.run("create").peak_memory > 50 * MIB
    with pytest.raises(SystemExit, match=r"plan failed with 1: .*there is no lineage"):
        runner.run("plan", identification=1)


# --- results ---


def cost(seconds: float, peak: float, **figures: Any) -> Cost:
    return Cost(seconds, 2 * seconds, 10, 20, 0, 20, int(peak * MIB), figures)


def filled(path: Path, *, apply_seconds: float = 1.0, grown: float = 100.0) -> Results:
    results = Results.open(path, {"code": "a"}, {"processor": "made up"})
    for size, peak in ((1.0, 100.0), (4.0, grown)):
        results.note_bytes(size, int(size * 1e9))
        results.add((size, "imports"), cost(0, 250))
        for phase in ("register base", "register aligned", "register subject", "create lineage"):
            results.add((size, phase), cost(1, 300))
        results.add((size, "copy"), cost(2, 250, unflushed_seconds=1.0))
        for layout in LAYOUTS:
            for phase in ("plan", "apply", "revert", "verify"):
                results.add((size, layout, "restore", phase), cost(apply_seconds, 250 + peak))
            results.add((size, layout, "restore", "load+save"), cost(8, 4_000, unflushed_seconds=4.0))
    return results


def add_projection(results: Results, rows: float, dense: float) -> None:
    results.add(("projection", "imports"), cost(0, 250))
    for share in (0.05, 0.2):
        results.add(
            ("projection", f"rows {share:g}"), cost(9, 300, module_seconds=rows, module_cpu_seconds=2 * rows, modules=4)
        )
    results.add(("projection", "dense"), cost(9, 600, module_seconds=dense, module_cpu_seconds=dense, modules=4))


def test_results_are_taken_up_again_with_the_same_code_and_dropped_with_another(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    written = filled(path)
    again = Results.open(path, {"code": "a"}, {})
    assert again.costs == written.costs
    assert again.sizes == [1.0, 4.0]
    assert again.runs(4.0, EVERY, "restore", "apply") == 1
    assert again.runs(8.0, EVERY, "restore", "apply") == 0
    assert Results.open(path, {"code": "b"}, {}).costs == {}
    assert json.loads(path.read_text())["costs"]["1/imports"][0]["seconds"] == 0


def test_measured_sizes_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--directory", str(tmp_path), "--operations", "restore", "--sizes", "1,4", "--times", "1"]
    options = patching._options(arguments)
    monkeypatch.setattr(patching, "_code_digest", lambda: "a")
    benchmark = patching.Benchmark(options)
    held = filled(tmp_path / "other.json")
    add_projection(held, 1, 10)
    benchmark.results.costs.update(held.costs)
    monkeypatch.setattr(patching, "make_checkpoints", lambda *_: pytest.fail("models are made"))
    benchmark.projection()
    for size in options.sizes:
        benchmark.size(size)
    for incomplete in (["--times", "2"], ["--operations", "subspace"]):
        more = patching.Benchmark(patching._options([*arguments, *incomplete]))
        more.results.costs.update(held.costs)
        with pytest.raises(pytest.fail.Exception, match="models are made"):
            more.size(4.0)


def test_figures_of_several_runs_are_their_medians(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "results.json", {}, {})
    for seconds, peak, unflushed in ((9.0, 30.0, 1.0), (1.0, 20.0, 3.0), (2.0, 40.0, 2.0)):
        results.add((1.0, "copy"), cost(seconds, peak, unflushed_seconds=unflushed, file="x"))
    assert results.get(1.0, "copy") == cost(2, 30, unflushed_seconds=2.0, file="x")
    results.add((10.0, "copy"), cost(1, 1))
    results.forget(1.0)
    assert [results.runs(size, "copy") for size in (1.0, 10.0)] == [0, 1]


def test_a_size_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="GB free"):
        patching._require_space(tmp_path, tmp_path / "size-9", 10**18)


def test_what_is_wanted_holds_where_the_figures_say_so(tmp_path: Path) -> None:
    results = filled(tmp_path / "results.json")
    add_projection(results, 1, 12)
    found = list(verdicts(results))
    assert len(found) == 4 * (1 + 2) + 2 + 1
    assert all(verdict.holds for verdict in found)
    assert "0.12 of it (0.25 of it without fsync" in found[-2].text
    assert "12.0 times as fast" in found[-1].text


@pytest.mark.parametrize(
    ("apply_seconds", "grown", "dense", "failing"),
    [
        (2.1, 100, 12, "against 8.00 s"),
        (1, 121, 12, "spread of 21%"),
        (1, 161, 12, "161 MiB"),
        (1, 100, 9, "9.0 times"),
    ],
)
def test_what_is_wanted_fails_where_the_figures_say_so(
    tmp_path: Path, apply_seconds: float, grown: float, dense: float, failing: str
) -> None:
    results = filled(tmp_path / "results.json", apply_seconds=apply_seconds, grown=grown)
    add_projection(results, 1, dense)
    wrong = [str(verdict) for verdict in verdicts(results) if not verdict.holds]
    assert wrong
    assert all(text.startswith("FAILS") and failing in text for text in wrong)


def test_no_verdict_on_time_without_the_size_that_it_is_about(tmp_path: Path) -> None:
    results = filled(tmp_path / "results.json", apply_seconds=9)
    del results.bytes["4"]
    assert all(verdict.holds for verdict in verdicts(results))


def test_the_tables_show_every_phase_at_every_size(tmp_path: Path) -> None:
    results = filled(tmp_path / "results.json")
    add_projection(results, 1, 12)
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(chain_table(results, EVERY, "restore"))
    console.print(set_up_table(results))
    text = console.export_text()
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 5 * 2 + 6 * 2
    assert any("apply" in line and "4.00" in line and "0.125" in line for line in lines)
    assert len(list(projection_lines(results))) == 4


def test_peak_memory_is_told_beyond_that_of_the_imports(tmp_path: Path) -> None:
    results = filled(tmp_path / "results.json")
    assert results.memory_beyond_imports(1.0, EVERY, "restore", "plan") == 100
    results.costs["1/imports"] = [cost(0, 0)]
    assert results.memory_beyond_imports(1.0, EVERY, "restore", "plan") == 350
    assert results.memory_beyond_imports(2.0, EVERY, "restore", "plan") is None
