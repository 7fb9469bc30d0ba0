"""NLSR end to end: real files with real forward passes, and its invariants in memory."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.calibration import CalibrationItem
from algorithms.errors import CalibrationError, MismatchError, SettingsError
from algorithms.loading import linear_module, load_model
from algorithms.nlsr import NlsrIdentification, NlsrModule, identify
from algorithms.nlsr_identifications import StoredNlsrIdentification
from algorithms.nlsr_settings import NLSR_PRESETS, NlsrModelRole, NlsrSettings
from algorithms.reference_files import write_reference
from algorithms.references import reference_weights
from algorithms.transplants import TransplantEditor
from algorithms.weights import LoraFactors, WeightSource, open_weights
from tests.algorithms.fakes import full, lora, low_rank, noise
from tests.algorithms.lineages import Lineage
from tests.tiny_models import quiet, save_adapter, save_model, save_variant

EVERY = slice(0, None)


@pytest.fixture(scope="module")
def full_lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    home = tmp_path_factory.mktemp("full")
    base = save_model(home / "base")
    aligned = save_variant(base, home / "aligned", seed=1)
    return Lineage(save_variant(aligned, home / "subject", seed=2), aligned, base)


@pytest.fixture(scope="module")
def adapter_lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    home = tmp_path_factory.mktemp("adapter")
    base = save_model(home / "base")
    aligned = save_adapter(base, home / "aligned", targets=["q_proj", "v_proj", "down_proj"], seed=4)
    subject = save_adapter(base, home / "subject", targets=["q_proj", "v_proj", "down_proj"], seed=4)
    tensors = load_file(subject / "adapter_model.safetensors")
    drift = {name: tensor + noise(*tensor.shape, seed=6, scale=0.05) for name, tensor in tensors.items()}
    save_file(drift, subject / "adapter_model.safetensors", metadata={"format": "pt"})
    return Lineage(subject, aligned, base, under=base, aligned_under=base)


class Loader:
    """Writes and loads the reference, or loads the aligned model; notes what was asked for."""

    def __init__(self, lineage: Lineage, settings: NlsrSettings, home: Path) -> None:
        self._lineage, self._settings, self._home = lineage, settings, home
        self.asked: list[NlsrModelRole] = []

    def __call__(self, role: NlsrModelRole) -> nn.Module:
        self.asked.append(role)
        path = self._lineage.aligned
        if role == "reference":
            aligned, base = open_weights(path, self._lineage.under), open_weights(self._lineage.base)
            path = write_reference(aligned, base, self._settings, self._home / f"reference{len(self.asked)}")
        with quiet():
            return load_model(path, self._lineage.under)[0]


def safe_pairs() -> list[CalibrationItem]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (26, 29, 17, 22, 18, 26):
        tokens = torch.randint(4, 60, (length,), generator=generator).tolist()
        found.append(CalibrationItem(tuple(tokens), tuple([False] * 4 + [True] * (length - 4)), 4))
    return found


def run(lineage: Lineage, chosen: NlsrSettings, home: Path, **more: Any) -> tuple[NlsrIdentification, Loader]:
    (subject, aligned), base = lineage.sources(), open_weights(lineage.base)
    reference = reference_weights(aligned, base, chosen)
    loader = Loader(lineage, chosen, home)
    head = more.pop("head", subject)
    found = identify(subject, reference, base, head, load=loader, safe=safe_pairs(), pad_id=0, settings=chosen, **more)
    return found, loader


def captured_inputs(model: nn.Module, module: str) -> Tensor:
    """Inputs of a module at the counted tokens, pair by pair."""
    found: list[Tensor] = []
    handle = linear_module(model, module).register_forward_hook(lambda _module, args, _out: found.append(args[0][0]))
    for item in safe_pairs():
        with torch.no_grad():
            model(input_ids=torch.tensor([item.input_ids]))
        found[-1] = found[-1][torch.tensor(item.mask)]
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_neurons_are_scored_by_the_norm_of_the_reduced_update(kind, full_lineage, adapter_lineage, tmp_path) -> None:
    lineage = full_lineage if kind == "full" else adapter_lineage
    chosen = NlsrSettings(rank_sparsity=0.5, gram_dtype="float64")
    found, loader = run(lineage, chosen, tmp_path)
    assert loader.asked == ["reference"]
    assert found.counted_tokens == sum(sum(item.mask) for item in safe_pairs())
    (subject, aligned), base = lineage.sources(), open_weights(lineage.base)
    reference = reference_weights(aligned, base, chosen)
    model = Loader(lineage, chosen, tmp_path / "again")("reference")
    assert {part.module.rsplit(".", 1)[1] for part in found.modules} >= {"q_proj", "v_proj", "down_proj"}
    for part in found.modules:
        x = captured_inputs(model, part.module)
        F = (reference.rows(part.module, EVERY) - base.rows(part.module, EVERY)).double()
        factors = subject.factors(part.module)
        smaller = min(*F.shape, 10**9 if factors is None else factors.A.shape[0])
        V = torch.linalg.svd(x @ F.T, full_matrices=False).Vh[: smaller // 2].T
        expected = (V @ V.T @ F).norm(dim=1)
        torch.testing.assert_close(part.scores.double(), expected, atol=1e-3 * float(expected.max()), rtol=1e-2)
        assert len(part.region) == max(1, round(0.2 * len(expected)))
        assert torch.equal(part.scores[part.region].sort().values, part.scores.sort().values[-len(part.region) :])
        assert part.ranks[part.region].sort().values.tolist() == list(range(len(part.region)))


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("preset", ["default", "random-control"])
def test_a_patched_module_selects_its_region_and_another_nothing(
    kind, preset, full_lineage, adapter_lineage, tmp_path
) -> None:
    lineage = full_lineage if kind == "full" else adapter_lineage
    found, loader = run(lineage, NLSR_PRESETS[preset], tmp_path)
    assert loader.asked == (["reference"] if preset == "default" else [])
    patched = {choice.module: choice.patched for choice in found.choices}
    assert set(patched) == {part.module for part in found.modules}
    assert 0 < sum(patched.values()) < len(patched)
    for part in found.modules:
        assert torch.equal(part.selected, part.region if patched[part.module] else torch.arange(0))
    subject = lineage.sources()[0]
    parameters = sum(len(part.selected) * subject.modules[part.module].in_features for part in found.modules)
    assert found.selected_parameters == parameters
    assert found.linear_parameters == sum(m.out_features * m.in_features for m in subject.modules.values())
    reached = {part.module for part in found.modules}
    assert set(found.unreached) == set(subject.modules) - reached
    assert bool(found.unreached) == (kind == "adapter")


def test_the_region_is_the_whole_weights_when_asked(full_lineage, adapter_lineage, tmp_path) -> None:
    of_update, _ = run(adapter_lineage, NlsrSettings(), tmp_path / "update")
    of_weight, _ = run(adapter_lineage, NlsrSettings(region_of="weight"), tmp_path / "weight")
    assert any(
        not torch.equal(one.region, other.region)
        for one, other in zip(of_update.modules, of_weight.modules, strict=True)
    )


@pytest.mark.parametrize("form", ["neuron", "factor"])
@pytest.mark.parametrize("score", ["low-rank", "wanda", "magnitude"])
def test_every_score_runs_in_both_forms_on_either_model(form, score, adapter_lineage, tmp_path) -> None:
    chosen = NlsrSettings(form=form, region_score=score, statistics_model="aligned", selection="all", beta=0.3)
    found, loader = run(adapter_lineage, chosen, tmp_path)
    assert loader.asked == ([] if score == "magnitude" else ["aligned"])
    assert all(choice.patched for choice in found.choices)
    assert all((part.masks is None) == (form == "neuron") for part in found.modules)
    assert all(0.0 < choice.similarity <= 1.0 for choice in found.choices)


@pytest.mark.parametrize("preset", sorted(NLSR_PRESETS))
def test_every_preset_runs_on_an_adapter(preset, adapter_lineage, tmp_path) -> None:
    found, _ = run(adapter_lineage, NLSR_PRESETS[preset], tmp_path)
    assert len(found.choices) == 6
    assert found.selected_parameters > 0


def test_a_recorded_identification_can_be_read_back(adapter_lineage, tmp_path) -> None:
    for form in ("neuron", "factor"):
        found, _ = run(adapter_lineage, NlsrSettings(form=form), tmp_path / form)
        path = tmp_path / f"{form}.safetensors"
        save_file(found.tensors(), path)
        summary = json.loads(json.dumps(found.summary()))
        again = StoredNlsrIdentification(summary, load_file(path)).whole()
        assert again.summary() == found.summary()
        assert (again.settings, again.choices, again.unreached) == (found.settings, found.choices, found.unreached)
        for one, other in zip(again.modules, found.modules, strict=True):
            assert_same_module(one, other)
        with pytest.raises(SettingsError, match="cannot be read"):
            StoredNlsrIdentification({**summary, "choices": [{}]}, found.tensors())
        with pytest.raises(SettingsError, match="cannot be read"):
            StoredNlsrIdentification(summary, {})


def assert_same_module(one: NlsrModule, other: NlsrModule) -> None:
    assert (one.module, one.input_group) == (other.module, other.input_group)
    for name in ("scores", "ranks", "region", "selected", "already_protected"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.masks is None) == (other.masks is None)
    if one.masks is not None and other.masks is not None:
        assert torch.equal(one.masks.A, other.masks.A)
        assert torch.equal(one.masks.B, other.masks.B)


def test_protected_neurons_are_counted_and_left_out_of_the_comparison(adapter_lineage, tmp_path) -> None:
    chosen = NlsrSettings(selection="all", sparsity=0.5)
    free, _ = run(adapter_lineage, chosen, tmp_path / "free")
    first, second = free.modules[0], free.modules[1]
    protected = {first.module: first.region[:2], second.module: second.region}
    found, _ = run(adapter_lineage, chosen, tmp_path / "held", protected=protected)
    again = {part.module: part for part in found.modules}
    assert torch.equal(again[first.module].region, first.region)
    assert torch.equal(again[first.module].already_protected, first.region[:2])
    before = {choice.module: choice for choice in free.choices}
    after = {choice.module: choice for choice in found.choices}
    assert after[first.module].similarity != before[first.module].similarity
    assert second.module not in after, "a module whose region is all protected is not ranked"
    assert torch.equal(again[second.module].selected, second.region)
    assert torch.equal(again[second.module].already_protected, second.region)


def test_the_factor_form_refuses_a_patched_module_with_a_protected_neuron(adapter_lineage, tmp_path) -> None:
    chosen = NlsrSettings(form="factor", selection="all")
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(SettingsError, match=f"every neuron of {name}, and 1 of them"):
        run(adapter_lineage, chosen, tmp_path, protected={name: torch.tensor([3])})
    left_alone = chosen.model_copy(update={"selection": "threshold", "threshold": -1.0})
    found, _ = run(adapter_lineage, left_alone, tmp_path / "left", protected={name: torch.tensor([3])})
    assert not any(choice.patched for choice in found.choices)
    assert found.selected_parameters == 0


def test_scope_is_narrowed_by_blocks_and_kinds(full_lineage, tmp_path) -> None:
    chosen = NlsrSettings(layers="1..1", modules=("q_proj", "up_proj"), region_score="magnitude")
    found, _ = run(full_lineage, chosen, tmp_path)
    assert [part.module for part in found.modules] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    for changed, reason in (({"layers": "1..2"}, "beyond the last block, 1"), ({"modules": ("k",)}, "of kind k")):
        with pytest.raises(SettingsError, match=reason):
            run(full_lineage, chosen.model_copy(update=changed), tmp_path)


def test_what_cannot_be_run_is_refused(full_lineage, adapter_lineage, tmp_path) -> None:
    with pytest.raises(MismatchError, match="is no adapter"):
        run(full_lineage, NlsrSettings(form="factor"), tmp_path)
    with pytest.raises(SettingsError, match="gram_memory_gib"):
        run(full_lineage, NlsrSettings(gram_memory_gib=1e-9), tmp_path)
    (subject, aligned), base = adapter_lineage.sources(), open_weights(adapter_lineage.base)
    with pytest.raises(CalibrationError, match="No calibration token"):
        identify(
            subject,
            aligned,
            base,
            subject,
            load=Loader(adapter_lineage, NlsrSettings(), tmp_path),
            safe=[],
            pad_id=0,
            settings=NlsrSettings(statistics_model="aligned"),
        )
    narrow = full("narrow", **{"model.layers.0.self_attn.q_proj": noise(3, 3, seed=0)})
    with pytest.raises(MismatchError, match="narrow has no module"):
        identify(subject, narrow, base, subject, load=no_model, safe=[], pad_id=0, settings=NlsrSettings())


def test_progress_names_its_stages(adapter_lineage, tmp_path) -> None:
    told: list[tuple[str, int, int]] = []
    run(adapter_lineage, NlsrSettings(), tmp_path, progress=lambda *step: told.append(step))
    assert {stage for stage, _, _ in told} == {"safe answers", "regions"}
    assert all(done <= total for _, done, total in told)
    assert told[-1] == ("regions", 6, 6)


def in_memory(seed: int) -> Iterator[tuple[WeightSource, WeightSource, WeightSource]]:
    """A full lineage and an adapter lineage of two modules."""
    base = full("b", m=noise(8, 6, seed=seed), n=noise(5, 6, seed=seed + 1))
    dense = [
        full(name, **{key: base.weights[key] + noise(*base.weights[key].shape, seed=seed + step) for key in ("m", "n")})
        for name, step in (("t", 2), ("a", 3))
    ]
    yield dense[0], dense[1], base
    of_aligned = {"m": low_rank(8, 6, 2, seed=seed + 4), "n": low_rank(5, 6, 2, seed=seed + 6)}
    of_subject = {
        name: LoraFactors(factors.A + 0.05, factors.B + 0.05, factors.scale) for name, factors in of_aligned.items()
    }
    yield lora("t", base, **of_subject), lora("a", base, **of_aligned), base


def no_model(role: NlsrModelRole) -> nn.Module:
    raise AssertionError(role)


def result_rows(subject: WeightSource, reference: WeightSource, part: NlsrModule) -> Tensor:
    """Effective rows of the selected neurons after the transplantation."""
    (edit,) = TransplantEditor(subject, reference, part.module, part.selected).edits()
    factors = subject.factors(part.module)
    if factors is None:
        return edit.values
    A = factors.A if edit.extension is None else torch.cat([factors.A, edit.extension])
    below = subject.rows(part.module, part.selected) - factors.scale * factors.B[part.selected] @ factors.A
    return below + factors.scale * edit.values @ A


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_patching_all_modules_with_a_full_region_gives_the_reference(seed: int) -> None:
    chosen = NlsrSettings(selection="all", sparsity=0, region_score="magnitude")
    for subject, aligned, base in in_memory(seed):
        reference = reference_weights(aligned, base, chosen)
        found = identify(subject, reference, base, subject, load=no_model, safe=[], pad_id=0, settings=chosen)
        for part in found.modules:
            rows = result_rows(subject, reference, part)
            torch.testing.assert_close(rows, reference.rows(part.module, EVERY), atol=1e-4, rtol=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["neuron", "factor"]))
def test_leaving_all_modules_alone_changes_nothing(seed: int, form: Any) -> None:
    chosen = NlsrSettings(form=form, selection="threshold", threshold=-1, region_score="magnitude")
    for subject, aligned, base in in_memory(seed):
        if form == "factor" and subject.factors("m") is None:
            continue
        reference = reference_weights(aligned, base, chosen)
        found = identify(subject, reference, base, subject, load=no_model, safe=[], pad_id=0, settings=chosen)
        assert [len(part.selected) for part in found.modules] == [0, 0]
        assert found.selected_parameters == 0


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_a_subject_that_is_the_reference_has_similarity_one_and_is_unchanged(seed: int) -> None:
    chosen = NlsrSettings(selection="all", region_score="magnitude")
    for subject, _, base in in_memory(seed):
        found = identify(subject, subject, base, subject, load=no_model, safe=[], pad_id=0, settings=chosen)
        assert [choice.similarity for choice in found.choices] == pytest.approx([1.0, 1.0])
        for part in found.modules:
            torch.testing.assert_close(result_rows(subject, subject, part), subject.rows(part.module, part.selected))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_a_run_is_reproducible_and_the_head_may_be_compared_instead(seed: int) -> None:
    chosen = NlsrSettings(region_score="magnitude", seed=seed)
    for subject, aligned, base in in_memory(seed):
        reference = reference_weights(aligned, base, chosen)

        sources = subject, reference, base
        run_of = partial(identify, *sources, load=no_model, safe=[], pad_id=0)
        assert run_of(subject, settings=chosen).choices == run_of(subject, settings=chosen).choices
        of_head = run_of(reference, settings=chosen.model_copy(update={"update": "head"}))
        assert [choice.similarity for choice in of_head.choices] == pytest.approx([1.0, 1.0])


def test_a_module_that_alignment_did_not_move_is_unreached() -> None:
    base = full("b", m=noise(8, 6, seed=0), n=noise(5, 6, seed=1))
    aligned = full("a", m=base.weights["m"] + 1, n=base.weights["n"].clone())
    subject = full("t", m=noise(8, 6, seed=2), n=noise(5, 6, seed=3))
    chosen = NlsrSettings(region_score="random", selection="all")
    reference = reference_weights(aligned, base, chosen)
    found = identify(subject, reference, base, subject, load=no_model, safe=[], pad_id=0, settings=chosen)
    assert found.unreached == ("n",)
    assert [choice.module for choice in found.choices] == ["m"]
