"""The reference is the extrapolation, in memory and on disk; β = 0 is the aligned model; wrong pairs are named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from algorithms import model_files
from algorithms.checkpoints import Checkpoint
from algorithms.differences import Difference
from algorithms.errors import CheckpointError, MismatchError, NonFiniteError, SettingsError
from algorithms.nlsr_settings import NlsrSettings
from algorithms.reference_files import write_reference
from algorithms.references import reference_weights
from algorithms.weights import open_weights
from tests import tiny_models
from tests.algorithms.fakes import full, lora, low_rank, noise

seeds = st.integers(0, 10_000)
betas = st.floats(0, 2)
EVERY = slice(0, None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per tensor even in tiny models."""
    monkeypatch.setattr(model_files, "BLOCK_BYTES", 500)


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("full")
    base = tiny_models.save_model(root / "base", dtype=torch.bfloat16, shard_size=4000)
    return base, tiny_models.save_variant(base, root / "aligned", shard_size=6000)


@pytest.fixture(scope="module")
def adapter_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapter")
    base = tiny_models.save_model(root / "base")
    return base, tiny_models.save_adapter(base, root / "aligned", dtype=torch.bfloat16, use_rslora=True)


@given(seeds, betas)
def test_a_full_reference_is_the_published_formula(seed: int, beta: float) -> None:
    W_0, W_a = noise(5, 4, seed=seed), noise(5, 4, seed=seed + 1)
    reference = reference_weights(full("a", m=W_a), full("b", m=W_0), NlsrSettings(beta=beta))
    expected = (1 + beta) * W_a.double() - beta * W_0.double()
    torch.testing.assert_close(reference.rows("m", EVERY).double(), expected, atol=1e-5, rtol=1e-5)
    picked = torch.tensor([3, 1])
    assert torch.equal(reference.rows("m", picked), reference.rows("m", EVERY)[picked])
    assert reference.factors("m") is None


@given(seeds, betas)
def test_the_update_of_an_adapter_grows_by_one_plus_beta(seed: int, beta: float) -> None:
    base = full("b", m=noise(5, 4, seed=seed))
    aligned = lora("a", base, m=low_rank(5, 4, 2, seed=seed + 1))
    reference = reference_weights(aligned, base, NlsrSettings(beta=beta))
    before, after = aligned.lora["m"], reference.factors("m")
    assert after is not None
    assert torch.equal(after.A, before.A)
    assert after.scale == before.scale
    growth = (after.B @ after.A).double() - (1 + beta) * (before.B @ before.A).double()
    assert float(growth.abs().max()) < 1e-4
    torch.testing.assert_close(
        reference.rows("m", EVERY), base.weights["m"] + after.scale * after.B @ after.A, atol=1e-5, rtol=1e-5
    )


@given(seeds)
def test_without_extrapolation_the_reference_is_the_aligned_model(seed: int) -> None:
    base = full("b", m=noise(5, 4, seed=seed))
    for aligned in (full("a", m=noise(5, 4, seed=seed + 1)), lora("a", base, m=low_rank(5, 4, 2, seed=seed))):
        assert reference_weights(aligned, base, NlsrSettings(beta=0)) is aligned


@given(seeds, betas)
def test_a_weight_that_alignment_did_not_move_stays_bit_for_bit(seed: int, beta: float) -> None:
    W = noise(5, 4, seed=seed)
    reference = reference_weights(full("a", m=W), full("b", m=W.clone()), NlsrSettings(beta=beta))
    assert torch.equal(reference.rows("m", EVERY), W)


def test_the_published_code_multiplies_both_factors() -> None:
    base = full("b", m=noise(5, 4, seed=0))
    aligned = lora("a", base, m=low_rank(5, 4, 2, seed=1))
    after = reference_weights(aligned, base, NlsrSettings(mode="published-code")).factors("m")
    before = aligned.lora["m"]
    assert after is not None
    assert torch.equal(after.A, before.A * 1.8)
    torch.testing.assert_close(after.B @ after.A, 3.24 * before.B @ before.A)


def test_the_reference_of_a_full_model_is_not_taken_for_the_aligned_one() -> None:
    aligned, base = full("a", m=noise(5, 4, seed=0)), full("b", m=noise(5, 4, seed=1))
    reference = reference_weights(aligned, base, NlsrSettings())
    assert Difference(reference, aligned, "m").norm() > 0
    assert reference.modules == aligned.modules


def test_a_module_without_adapter_is_the_base_in_the_reference() -> None:
    base = full("b", m=noise(5, 4, seed=0), n=noise(3, 4, seed=1))
    reference = reference_weights(lora("a", base, m=low_rank(5, 4, 2, seed=2)), base, NlsrSettings())
    assert reference.factors("n") is None
    assert torch.equal(reference.rows("n", EVERY), base.weights["n"])


def test_pairs_that_have_no_reference_are_named() -> None:
    base = full("b", m=noise(5, 4, seed=0))
    aligned = lora("a", base, m=low_rank(5, 4, 2, seed=1))
    other = full("other", m=noise(5, 4, seed=2))
    with pytest.raises(MismatchError, match="other is not the checkpoint under the aligned adapter"):
        reference_weights(aligned, other, NlsrSettings())
    with pytest.raises(MismatchError, match="not the checkpoint under"):
        reference_weights(aligned, lora("below", base, m=low_rank(5, 4, 2, seed=3)), NlsrSettings())
    with pytest.raises(MismatchError, match=r"no module m of shape 5 × 4"):
        reference_weights(full("a", m=noise(5, 4, seed=3)), full("b", m=noise(5, 3, seed=3)), NlsrSettings())
    with pytest.raises(SettingsError, match="is a full checkpoint"):
        reference_weights(full("a", m=noise(5, 4, seed=3)), base, NlsrSettings(mode="published-code"))


def test_a_written_checkpoint_holds_the_reference_in_the_aligned_models_layout(tmp_path, full_pair) -> None:
    base, aligned = full_pair
    settings = NlsrSettings(beta=0.7)
    told: list[int] = []
    sources = open_weights(aligned), open_weights(base)
    output = write_reference(*sources, settings, tmp_path / "new" / "reference", told.append)
    assert {file.name for file in output.iterdir()} == {file.name for file in aligned.iterdir()}
    before, after, below = Checkpoint.open(aligned), Checkpoint.open(output), Checkpoint.open(base)
    assert after.tensors == before.tensors
    assert after.metadata == before.metadata
    assert sum(told) == sum(stored.end - stored.begin for stored in after.tensors.values())
    for name in before.tensors:
        W_a, W_0 = before.read(name).double(), below.read(name).double()
        torch.testing.assert_close(after.read(name).double(), W_a + 0.7 * (W_a - W_0), atol=1e-6, rtol=2**-8)
        assert after.read(name).dtype == torch.bfloat16
    for file in aligned.iterdir():
        if not file.name.endswith(".safetensors"):
            assert (output / file.name).read_bytes() == file.read_bytes(), file.name
    view, written = reference_weights(*sources, settings), open_weights(output)
    for name in view.modules:
        assert torch.equal(view.rows(name, EVERY).bfloat16(), written.rows(name, EVERY).bfloat16())


@pytest.mark.parametrize("family", ["gpt2", "gemma", "phi3"])
def test_families_that_store_weights_otherwise_have_the_same_reference(tmp_path, family) -> None:
    base = tiny_models.save_model(tmp_path / "base", family)
    sources = open_weights(tiny_models.save_variant(base, tmp_path / "aligned")), open_weights(base)
    output = write_reference(*sources, NlsrSettings(beta=0.5), tmp_path / "reference")
    view, written = reference_weights(*sources, NlsrSettings(beta=0.5)), open_weights(output)
    for name in view.modules:
        assert torch.equal(view.rows(name, EVERY), written.rows(name, EVERY))
    with torch.no_grad():
        tiny_models.load_model(output)(torch.arange(4, 12)[None])


def test_a_written_checkpoint_without_extrapolation_is_the_aligned_one_byte_for_byte(tmp_path, full_pair) -> None:
    base, aligned = full_pair
    output = write_reference(open_weights(aligned), open_weights(base), NlsrSettings(beta=0), tmp_path / "reference")
    for file in aligned.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("mode", ["exact", "published-code"])
def test_a_written_adapter_loads_with_peft_and_is_the_reference(tmp_path, adapter_pair, mode) -> None:
    base, aligned = adapter_pair
    settings = NlsrSettings(beta=0.4, mode=mode)
    sources = open_weights(aligned, base), open_weights(base)
    output = write_reference(*sources, settings, tmp_path / "reference")
    assert json.loads((output / "adapter_config.json").read_text()) == json.loads(
        (aligned / "adapter_config.json").read_text()
    )
    view, merged = reference_weights(*sources, settings), tiny_models.merged_model(base, output).state_dict()
    for name, module in view.modules.items():
        torch.testing.assert_close(view.rows(name, EVERY), merged[module.tensor], atol=1e-5, rtol=1e-5)
        assert torch.equal(view.rows(name, EVERY), open_weights(output, base).rows(name, EVERY))


def test_a_written_adapter_without_extrapolation_is_the_aligned_one(tmp_path, adapter_pair) -> None:
    base, aligned = adapter_pair
    sources = open_weights(aligned, base), open_weights(base)
    output = write_reference(*sources, NlsrSettings(beta=0), tmp_path / "reference")
    before, after = load_file(aligned / "adapter_model.safetensors"), load_file(output / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def change_tensor(model: Path, target: Path, change) -> Path:
    """A copy of a model of one file in which one dictionary of tensors was changed."""
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_tensors_that_do_not_pair_are_named_and_nothing_is_left(tmp_path) -> None:
    base = tiny_models.save_model(tmp_path / "base")
    aligned = open_weights(base)
    cut = change_tensor(base, tmp_path / "cut", lambda held: held.update({"lm_head.weight": torch.zeros(3, 16)}))
    with pytest.raises(MismatchError, match=r"lm_head.weight has shape \(64, 16\) in .*base and \(3, 16\)"):
        write_reference(aligned, open_weights(cut), NlsrSettings(), tmp_path / "reference")
    less = change_tensor(base, tmp_path / "less", lambda held: held.pop("lm_head.weight"))
    with pytest.raises(MismatchError, match=r"lm_head.weight is in .*base but not in .*less"):
        write_reference(aligned, open_weights(less), NlsrSettings(), tmp_path / "reference")
    with pytest.raises(MismatchError, match=r"lm_head.weight is in .*base but not in .*less"):
        write_reference(open_weights(less), aligned, NlsrSettings(), tmp_path / "reference")
    assert not (tmp_path / "reference").exists()
    assert not list(tmp_path.glob(".reference*"))


def test_a_reference_that_overflows_its_dtype_is_refused(tmp_path) -> None:
    base = tiny_models.save_model(tmp_path / "base", dtype=torch.float16)
    aligned = change_tensor(
        base, tmp_path / "aligned", lambda held: held["model.layers.0.mlp.up_proj.weight"].fill_(60000)
    )
    with pytest.raises(NonFiniteError, match="up_proj"):
        write_reference(open_weights(aligned), open_weights(base), NlsrSettings(), tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_an_adapter_as_the_base_of_a_full_model_is_refused_for_files(tmp_path) -> None:
    base = tiny_models.save_model(tmp_path / "base")
    adapter = open_weights(tiny_models.save_adapter(base, tmp_path / "adapter"), base)
    with pytest.raises(MismatchError, match="is an adapter, and the aligned model is a full checkpoint"):
        write_reference(open_weights(base), adapter, NlsrSettings(), tmp_path / "reference")


def test_an_output_that_holds_something_is_not_written_to(tmp_path, full_pair) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "notes").touch()
    with pytest.raises(CheckpointError, match="not an empty directory"):
        write_reference(open_weights(full_pair[1]), open_weights(full_pair[0]), NlsrSettings(), tmp_path / "reference")
