"""Single entries put back at random: each one of two values, drawn by seed and module, and a line like the others."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import real_model
import torch
from real_model_commands import Results
from real_model_entries import _draw, put_entries_back
from real_model_models import Attack, BenchmarkModels
from real_model_runs import DIMENSIONS, Run, settings
from real_model_summary import UNSEEN, document, modified_share
from real_model_tables import page
from torch import Tensor

from algorithms.adapters import is_adapter
from algorithms.checkpoints import Checkpoint
from algorithms.weights import CheckpointWeights, open_weights
from tests.benchmarks.real_model_scenarios import Here, tiny_models
from tests.tiny_models import load_model, merged_model, save_adapter, save_model, save_variant

torch.set_num_threads(1)

SHARE = 0.15
LIMIT = 4
RUNS = (
    Run(
        "sparse",
        settings("operation=restore", "budget=0.2", "prompts=4"),
        "ours",
        "main",
        ("entries-random",),
        DIMENSIONS[:1],
    ),
    Run("entries-random", (), "control", "main", dimensions=(), entries=SHARE),
)
CHECKPOINT = f"entries-{SHARE:g}"


@pytest.fixture(scope="module", params=["lora", "full"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BenchmarkModels:
    return tiny_models(tmp_path_factory.mktemp("benchmark"), request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run"


def models_of(home: Path, form: str, family: str = "llama") -> BenchmarkModels:
    """Models stored in bfloat16, as the benchmark's are; none of their prompts."""
    base = save_model(home / "base", family, dtype=torch.bfloat16, shard_size="10KB")
    if form == "lora":
        aligned, subject = (save_adapter(base, home / name, seed=seed) for name, seed in (("a", 4), ("s", 5)))
    else:
        aligned = save_variant(base, home / "a", seed=1)
        subject = save_variant(aligned, home / "s", seed=2, shard_size="10KB")
    return BenchmarkModels(base, aligned, subject, home, {}, {})


def effective(models: BenchmarkModels, path: Path) -> dict[str, Tensor]:
    """Effective weights of a model's linear modules in float32."""
    weights = open_weights(path, models.base if is_adapter(path) else None)
    return {name: weights.rows(name, slice(None)) for name in weights.modules}


def stored(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("form", ["lora", "full"])
def test_each_entry_is_the_aligned_or_the_fine_tuned_one_bit_for_bit(form: str, tmp_path: Path) -> None:
    models = models_of(tmp_path, form)

    count = put_entries_back(models, SHARE, tmp_path / "out")

    theirs, ours = effective(models, models.aligned), effective(models, models.subject)
    differing = back = total = 0
    for name, mixed in effective(models, tmp_path / "out").items():
        is_theirs, is_ours = mixed == theirs[name], mixed == ours[name]
        assert bool((is_theirs | is_ours).all()), name
        differs = theirs[name] != ours[name]
        differing += int(differs.sum())
        back += int((is_theirs & differs).sum())
        total += mixed.numel()
    tolerance = 4 * (total * SHARE * (1 - SHARE)) ** 0.5
    assert abs(count - SHARE * total) < tolerance
    assert abs(back - SHARE * differing) < tolerance
    assert 0 <= count - back <= total - differing


@pytest.mark.parametrize("form", ["lora", "full"])
def test_all_else_is_the_subjects_and_the_dtype_loses_nothing(form: str, tmp_path: Path) -> None:
    models = models_of(tmp_path, form)

    put_entries_back(models, SHARE, tmp_path / "out")

    found = stored(tmp_path / "out")
    linear = {module.tensor for module in CheckpointWeights(Checkpoint.open(tmp_path / "out")).modules.values()}
    before = stored(models.base if form == "lora" else models.subject)
    assert found.keys() == before.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32 if form == "lora" else torch.bfloat16}
    assert all(torch.equal(found[name].float(), before[name].float()) for name in found.keys() - linear)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.glob("out/*")}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_put_back_is_the_subject_and_everything_is_the_aligned_model(share: float, tmp_path: Path) -> None:
    models = models_of(tmp_path, "lora")

    put_entries_back(models, share, tmp_path / "out")

    expected = merged_model(models.base, models.aligned if share else models.subject).state_dict()
    for name, weight in load_model(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(weight, expected[name])


def test_weights_that_a_file_holds_transposed_are_put_back_where_they_belong(tmp_path: Path) -> None:
    models = models_of(tmp_path, "full", "gpt2")

    put_entries_back(models, 1.0, tmp_path / "out")

    theirs = effective(models, models.aligned)
    assert all(torch.equal(weight, theirs[name]) for name, weight in effective(models, tmp_path / "out").items())


def test_the_same_seed_gives_the_same_checkpoint_and_another_seed_another(tmp_path: Path) -> None:
    models = models_of(tmp_path, "full")
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))

    counts = [put_entries_back(models, SHARE, path, seed) for path, seed in ((one, 0), (same, 0), (other, 1))]

    assert counts[0] == counts[1]
    assert all(torch.equal(value, stored(same)[name]) for name, value in stored(one).items())
    assert any(not torch.equal(value, stored(other)[name]) for name, value in stored(one).items())


def test_the_draw_of_a_module_is_its_own_whatever_the_others_are(tmp_path: Path) -> None:
    modules = CheckpointWeights(Checkpoint.open(save_model(tmp_path / "model"))).modules

    def drawn(names: Iterable[str]) -> dict[str, Tensor]:
        weights: Any = SimpleNamespace(modules={name: modules[name] for name in names})
        return {module.name: taken for module, taken in _draw(weights, SHARE, 0)}

    found = drawn(modules)
    last = list(modules)[-1]
    alike = [taken for taken in found.values() if taken.shape == found[last].shape]

    assert torch.equal(drawn([last])[last], found[last])
    assert all(torch.equal(taken, found[name]) for name, taken in drawn(reversed(modules)).items())
    assert len(alike) == 2
    assert not torch.equal(*alike)


def run(models: BenchmarkModels, place: Path, here: type[Here] = Here) -> tuple[Here, Results]:
    commands, results = here(place), Results(place / "results.json")
    real_model.run_all(commands, models, RUNS, results, place, limit=LIMIT)  # type: ignore[arg-type]
    return commands, results


def test_it_is_a_line_like_the_other_controls(models: BenchmarkModels, place: Path) -> None:
    _, results = run(models, place)

    conditions = {"decoding": "greedy decoding", "max_new_tokens": 24, "threads": 1}
    found = json.loads(json.dumps(document(Attack(), models, RUNS, results.content, conditions)))
    sparse, line = found["runs"]
    linear = sum(weight.numel() for weight in effective(models, models.subject).values())
    patch = results.content["entries-random"]["stages"][0]["patch"]
    assert (line["family"], line["part"], line["refused"]) == ("control", "main", None)
    assert modified_share(line) == pytest.approx(100 * patch["parameters_modified"] / linear)
    assert modified_share(line) == pytest.approx(100 * SHARE, abs=2)
    assert set(sparse["tests"]) == {"entries-random"}
    assert sparse["tests"]["entries-random"]["all"]["n"] == LIMIT * len((*DIMENSIONS, *UNSEEN))
    text = page(found)
    assert f"| {modified_share(line):.1f} |" in next(row for row in text.splitlines() if row.startswith("| `entries-"))
    assert "| `sparse` | `entries-random` |" in text


class Stopping(Here):
    """Stops where the checkpoint is registered, or where it is measured."""

    at: tuple[str, ...] = ()

    def __call__(self, *arguments: object) -> Any:
        if self.at and set(self.at) <= set(map(str, arguments)):
            raise KeyboardInterrupt
        return super().__call__(*arguments)


@pytest.mark.parametrize("at", [("register", CHECKPOINT), ("evaluate", CHECKPOINT)])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    at: tuple[str, ...], models: BenchmarkModels, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopping, "at", at)
    with pytest.raises(KeyboardInterrupt):
        run(models, place, Stopping)
    assert "entries-random" not in json.loads((place / "results.json").read_text())
    built = stored(place / "references" / CHECKPOINT)

    commands, results = run(models, place)

    assert all(torch.equal(value, built[name]) for name, value in stored(place / "references" / CHECKPOINT).items())
    assert (f"model register {CHECKPOINT}" in commands.done) == (at[0] == "register")
    assert results.content["entries-random"]["stages"][0]["outcomes"].keys() == {*DIMENSIONS, *UNSEEN}


def test_what_is_unfinished_is_not_taken_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = models_of(tmp_path, "lora")
    whole, output = tmp_path / "whole", tmp_path / "out"
    count = put_entries_back(models, SHARE, whole)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("real_model_entries._write_entries", stop)
        with pytest.raises(KeyboardInterrupt):
            put_entries_back(models, SHARE, output)
    assert not output.exists()

    assert put_entries_back(models, SHARE, output) == count
    assert all(torch.equal(value, stored(output)[name]) for name, value in stored(whole).items())
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}
