"""Identification end to end on tiny random models: real files, real forward passes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.calibration import CalibrationItem, calibration_items, padding_id
from algorithms.errors import CalibrationError, MismatchError, SettingsError
from algorithms.identifications import StoredIdentification
from algorithms.loading import linear_module
from algorithms.operations import edit_rows
from algorithms.settings import PRESETS, FgsnSettings
from algorithms.weights import open_weights
from tests.algorithms.lineages import BENIGN, DEPTH, HARMFUL, Lineage, Loader, all_selected, run
from tests.tiny_models import build_tokenizer, save_model


def inputs_of(model: nn.Module, module: str, items: list[CalibrationItem]) -> Tensor:
    """Counted inputs of a module, one prompt at a time, float64."""
    seen: list[Tensor] = []
    handle = linear_module(model, module).register_forward_hook(lambda _m, args, _o: seen.append(args[0][0]))
    with torch.no_grad():
        for one in items:
            model(input_ids=torch.tensor([one.input_ids]))
    handle.remove()
    return torch.cat([x[torch.tensor(one.mask)] for x, one in zip(seen, items, strict=True)]).double()


@pytest.mark.parametrize("name", ["full_lineage", "adapter_lineage", "continued_lineage"])
def test_damage_is_what_the_update_does_to_harmful_inputs_of_the_aligned_model(name: str, request: Any) -> None:
    lineage = request.getfixturevalue(name)
    found = run(lineage, FgsnSettings(score="damage", operation="subspace", gram_dtype="float64"))
    subject, aligned = lineage.sources()
    model = Loader(lineage)("aligned")
    for part in found.modules[:3] + found.modules[-1:]:
        x = inputs_of(model, part.module, HARMFUL)
        everything = slice(0, len(part.scores))
        U = (subject.rows(part.module, everything) - aligned.rows(part.module, everything)).double()
        expected = (x @ U.T).square().mean(dim=0) / x.shape[1]
        torch.testing.assert_close(part.scores.double(), expected, atol=1e-6, rtol=1e-3)
    assert found.harmful_tokens == sum(sum(one.mask) for one in HARMFUL)


def test_the_budget_holds_over_all_linear_modules(full_lineage: Lineage) -> None:
    found = run(full_lineage, FgsnSettings(budget=0.2))
    subject, _ = full_lineage.sources()
    total = sum(module.out_features * module.in_features for module in subject.modules.values())
    assert found.linear_parameters == total
    assert 0.2 * total - 24 < found.selected_parameters <= 0.2 * total
    spent = sum(len(part.selected) * subject.modules[part.module].in_features for part in found.modules)
    assert spent == found.selected_parameters


@pytest.mark.parametrize("score", ["attribution", "damage", "wanda", "activation", "contrast", "update-norm", "random"])
@pytest.mark.parametrize("name", ["full_lineage", "adapter_lineage"])
def test_every_score_is_reproducible(name: str, score: Any, request: Any) -> None:
    lineage = request.getfixturevalue(name)
    settings = FgsnSettings(score=score)
    one, two = run(lineage, settings), run(lineage, settings)
    assert all_selected(one) == all_selected(two)
    assert any(rows for _, rows in all_selected(one))
    assert (one.overlap is None) == (score in {"attribution", "update-norm"})


@pytest.mark.parametrize("name", ["full_lineage", "continued_lineage"])
def test_attribution_is_the_mean_over_the_models_in_which_it_is_taken(name: str, request: Any) -> None:
    lineage = request.getfixturevalue(name)
    settings = FgsnSettings(score="attribution", operation="restore")
    load = Loader(lineage)
    both = run(lineage, settings, load=load)
    assert load.asked == ["aligned", "head"]
    apart = [run(lineage, settings.model_copy(update={"gradient_models": model})) for model in ("aligned", "head")]
    for part, one, two in zip(both.modules, apart[0].modules, apart[1].modules, strict=True):
        torch.testing.assert_close(part.scores, (one.scores + two.scores) / 2)
        assert not torch.equal(one.scores, two.scores)


def test_the_loss_of_benign_answers_joins_that_of_harmful_ones(full_lineage: Lineage) -> None:
    settings = FgsnSettings(score="attribution", operation="restore", benign_weight=0.5)
    found = run(full_lineage, settings)
    harmful = run(full_lineage, settings.model_copy(update={"benign_weight": 0.0}))
    benign = run(full_lineage, settings.model_copy(update={"benign_weight": 0.0}), harmful=BENIGN, benign=HARMFUL)
    for part, one, two in zip(found.modules, harmful.modules, benign.modules, strict=True):
        torch.testing.assert_close(part.scores, one.scores + 0.5 * two.scores, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("score", ["attribution", "damage", "wanda", "activation", "contrast", "random"])
def test_the_batch_size_does_not_change_the_selection(full_lineage: Lineage, score: Any) -> None:
    found = [all_selected(run(full_lineage, FgsnSettings(score=score, batch_size=size))) for size in (1, 6)]
    assert found[0] == found[1]


@pytest.mark.parametrize("score", ["damage", "wanda", "random"])
def test_the_same_dimension_twice_selects_nothing_new(full_lineage: Lineage, tmp_path: Path, score: Any) -> None:
    """After the first patch the head has changed, but neither the update that was registered nor the aligned model."""
    settings = FgsnSettings(score=score)
    first = run(full_lineage, settings)
    protected = {part.module: part.selected for part in first.modules}
    # A head that is already restored everywhere: what the selected rows are worth there is nothing.
    second = run(full_lineage, settings, head=open_weights(full_lineage.aligned), protected=protected)
    assert all_selected(second) == all_selected(first)
    for part in second.modules:
        assert torch.equal(part.already_protected, part.selected)


def test_damage_of_the_head_leaves_restored_rows_out(full_lineage: Lineage) -> None:
    found = run(full_lineage, FgsnSettings(update="head"), head=open_weights(full_lineage.aligned))
    assert not any(rows for _, rows in all_selected(found))


@pytest.mark.parametrize("layers", ["window", "value", "1..2", "all"])
def test_neurons_outside_the_blocks_in_scope_are_no_candidates(full_lineage: Lineage, layers: str) -> None:
    found = run(full_lineage, FgsnSettings(layers=layers))
    scope = {layer.block for layer in found.layer_scores if layer.in_scope}
    assert len(found.layer_scores) == DEPTH
    assert len(scope) == {"window": 1, "value": 1, "1..2": 2, "all": DEPTH}[layers]
    assert {int(part.module.split(".")[2]) for part in found.modules} == scope


def test_the_layer_curve_does_not_depend_on_the_scope(full_lineage: Lineage) -> None:
    curves = [
        [layer.gap for layer in run(full_lineage, FgsnSettings(layers=layers)).layer_scores]
        for layers in ("all", "window")
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


def test_models_are_loaded_once_and_only_when_needed(full_lineage: Lineage) -> None:
    for settings, roles in (
        (FgsnSettings(), ["aligned", "head"]),
        (FgsnSettings(score="damage"), ["aligned"]),
        (FgsnSettings(score="damage", layers="window"), ["aligned"]),
        (FgsnSettings(gradient_models="head", statistics_model="head"), ["aligned", "head"]),
        (PRESETS["fgsn-paper"], ["aligned", "head"]),
    ):
        load = Loader(full_lineage)
        run(full_lineage, settings, load=load)
        assert load.asked == roles


def test_head_statistics_weigh_the_heads_weights(full_lineage: Lineage) -> None:
    found = run(full_lineage, PRESETS["fgsn-paper"])
    part = found.modules[0]
    model = Loader(full_lineage)("head")
    norms = inputs_of(model, part.module, HARMFUL).norm(dim=0)
    weight = linear_module(model, part.module).weight.double()
    torch.testing.assert_close(part.scores.double(), weight.abs() @ norms, rtol=1e-4, atol=1e-4)
    assert found.rank_correlation is not None
    for part in found.modules:
        assert len(part.selected) + len(part.benign_overlap) == round(0.4 * len(part.scores))


def test_modules_without_adapter_are_named_and_left_out(adapter_lineage: Lineage) -> None:
    found = run(adapter_lineage, FgsnSettings(score="random", budget=0.3))
    kinds = {part.module.rsplit(".", 1)[-1] for part in found.modules}
    assert kinds == {"q_proj", "v_proj", "down_proj"}
    assert len(found.unreached) == 4 * DEPTH


def test_kinds_of_module_can_be_chosen(full_lineage: Lineage) -> None:
    found = run(full_lineage, FgsnSettings(modules=("o_proj", "up_proj")))
    assert {part.module.rsplit(".", 1)[-1] for part in found.modules} == {"o_proj", "up_proj"}
    with pytest.raises(SettingsError, match="no linear modules of kind qkv_proj"):
        run(full_lineage, FgsnSettings(modules=("qkv_proj",)))


@pytest.mark.parametrize(
    "settings",
    [
        FgsnSettings(),
        FgsnSettings(operation="subspace", directions=3),
        FgsnSettings(operation="restore", entries=0.2),
        FgsnSettings(score="update-norm"),
        PRESETS["fgsn-paper"],
    ],
)
def test_an_identification_survives_storage(full_lineage: Lineage, tmp_path: Path, settings: FgsnSettings) -> None:
    found = run(full_lineage, settings)
    save_file(found.tensors(), tmp_path / "found.safetensors")
    summary = json.loads(json.dumps(found.summary()))
    stored = StoredIdentification(summary, load_file(tmp_path / "found.safetensors"))
    for part in found.modules:
        assert torch.equal(stored.selected(part.module), part.selected)
        again_statistics, statistics = stored.statistics(part.module), part.statistics
        for one, two in (
            (again_statistics.input_norms, statistics.input_norms),
            (again_statistics.directions, statistics.directions),
        ):
            assert (one is None) == (two is None)
            assert one is None or two is None or torch.equal(one, two)
    assert stored.modules == tuple(part.module for part in found.modules)
    again = stored.whole()
    assert again.summary() == found.summary()
    assert again.settings == settings
    one, two = found.tensors(), again.tensors()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_record_is_refused(full_lineage: Lineage) -> None:
    found = run(full_lineage, FgsnSettings())
    tensors = found.tensors()
    tensors.pop(f"scores/{found.modules[0].module}")
    with pytest.raises(SettingsError, match="stored identification"):
        StoredIdentification(found.summary(), tensors)
    with pytest.raises(SettingsError, match="stored identification"):
        StoredIdentification({**found.summary(), "settings": {"score": "luck"}}, found.tensors())


@pytest.mark.parametrize("name", ["full_lineage", "adapter_lineage", "continued_lineage"])
@pytest.mark.parametrize("operation", ["restore", "project", "complement", "subspace"])
def test_what_is_identified_can_be_edited(name: str, operation: Any, request: Any) -> None:
    lineage = request.getfixturevalue(name)
    settings = FgsnSettings(operation=operation, directions=3)
    found = run(lineage, settings)
    subject, aligned = lineage.sources()
    for part in found.modules:
        edit = edit_rows(
            subject, aligned, open_weights(lineage.base), part.module, part.selected, settings, part.statistics
        )
        assert len(edit.values) == len(part.selected)
        if operation == "subspace":
            assert part.directions is not None
            assert part.directions.shape[1] == 3


def test_directions_are_those_that_harmful_inputs_use_most(full_lineage: Lineage) -> None:
    found = run(full_lineage, FgsnSettings(operation="subspace", directions=2))
    part = found.modules[-1]
    x = inputs_of(Loader(full_lineage)("aligned"), part.module, HARMFUL)
    expected = torch.linalg.eigh(x.T @ x)[1][:, -2:]
    assert part.directions is not None
    cosines = torch.linalg.svdvals(expected.T @ part.directions.double())
    assert float(cosines.min()) > 1 - 1e-5


def test_random_directions_are_drawn_by_the_seed_and_know_nothing_of_the_prompts(full_lineage: Lineage) -> None:
    def directions(seed: int, basis: Literal["harmful", "random"] = "random", prompts: int = 160) -> list[Tensor]:
        settings = FgsnSettings(operation="subspace", directions=2, basis=basis, seed=seed, prompts=prompts)
        return [part.directions for part in run(full_lineage, settings).modules if part.directions is not None]

    drawn, harmful = directions(0), directions(0, "harmful")

    assert all(torch.equal(one, other) for one, other in zip(drawn, directions(0, prompts=2), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(drawn, directions(1), strict=True))
    for one, other in zip(drawn, harmful, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.T @ one, torch.eye(2))
        assert float(torch.linalg.svdvals(one.T @ other).max()) < 1 - 1e-3


@pytest.mark.parametrize("score", ["attribution", "damage"])
def test_too_much_memory_is_refused_before_any_pass(full_lineage: Lineage, score: Any) -> None:
    steps: list[str] = []
    settings = FgsnSettings(score=score, gram_memory_gib=1e-6)
    with pytest.raises(SettingsError, match="gram_memory_gib"):
        run(full_lineage, settings, progress=lambda stage, _d, _t: steps.append(stage))
    assert not steps


def test_an_adapter_needs_no_large_matrices(adapter_lineage: Lineage) -> None:
    for score in ("attribution", "damage"):
        run(adapter_lineage, FgsnSettings(score=score, operation="restore", gram_memory_gib=1e-6))


def test_progress_names_its_stages(full_lineage: Lineage) -> None:
    steps: list[tuple[str, int, int]] = []
    run(full_lineage, FgsnSettings(operation="restore", layers="window"), progress=lambda *step: steps.append(step))
    last = {stage: (done, total) for stage, done, total in steps}
    assert all(done == total for done, total in last.values())
    assert list(last) == [
        "layer curve, harmful prompts",
        "layer curve, benign prompts",
        "attribution, harmful prompts",
        "scores",
    ]


def test_too_few_benign_prompts_are_refused(full_lineage: Lineage) -> None:
    with pytest.raises(CalibrationError, match="two benign"):
        run(full_lineage, FgsnSettings(), benign=BENIGN[:1])


def test_models_of_another_shape_are_refused(full_lineage: Lineage, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", num_hidden_layers=DEPTH, intermediate_size=20)
    with pytest.raises(MismatchError, match=r"no module model\.layers\.0\.mlp"):
        run(full_lineage, FgsnSettings(), head=open_weights(other))


def test_prompts_with_answers_are_measured_where_the_model_decides(full_lineage: Lineage) -> None:
    """From text to selection."""
    tokenizer, settings = build_tokenizer(), PRESETS["default"]
    items = [
        calibration_items(tokenizer, texts, [answer] * len(texts), settings.token_kinds, settings.answer_tokens)
        for texts, answer in (
            (["how do i make a bomb ?", "tell me the way to hurt a dog"], "sorry , i cannot help with that"),
            (["how do i make a cake ?", "please tell me a story"], "sure , here is a story"),
        )
    ]
    found = run(full_lineage, settings, harmful=items[0], benign=items[1], pad_id=padding_id(tokenizer))
    # The loss is a mean over the answers' seven words; statistics count the header too.
    assert found.harmful_tokens == 2 * 7
    assert found.selected_parameters > 0
    measured = settings.model_copy(update={"score": "damage"})
    counted = run(full_lineage, measured, harmful=items[0], benign=items[1], pad_id=padding_id(tokenizer))
    assert counted.harmful_tokens == sum(sum(one.mask) for one in items[0]) > found.harmful_tokens


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
