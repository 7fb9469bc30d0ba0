"""Effective rows are the rows of the model that transformers and PEFT would run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from algorithms import weights as weights_module
from algorithms.errors import AdapterError, CheckpointError, MismatchError
from algorithms.weights import AdapterWeights, CheckpointWeights, WeightSource, open_weights, require_pair, row_blocks
from tests import tiny_models

TARGETS = {"gemma3": r".*language_model\.layers.*_proj"}
ALL = slice(None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Base and adapter of two families, one of them with transposed weights."""
    result = {}
    for family in ("llama", "gpt2"):
        root = tmp_path_factory.mktemp(family)
        base = tiny_models.save_model(root / "base", family)
        result[family] = (base, tiny_models.save_adapter(base, root / "adapter"))
    return result


def reference(model: torch.nn.Module, weights: WeightSource) -> dict[str, torch.Tensor]:
    """Weights (out, in) in float32, taken from a loaded model."""
    modules = dict(model.named_modules())
    stored = {name: modules[name].weight.detach().float() for name in weights.modules}
    return {name: stored[name].T if linear.transposed else stored[name] for name, linear in weights.modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_rows_of_a_checkpoint_are_those_of_the_loaded_model(tmp_path, family, dtype):
    path = tiny_models.save_model(tmp_path, family, dtype=dtype, shard_size=6000)
    weights = open_weights(path)
    expected = reference(tiny_models.load_model(path, dtype), weights)
    for name, weight in expected.items():
        rows = weights.rows(name, ALL)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, weight)
        assert weights.factors(name) is None


@pytest.mark.parametrize("family", tiny_models.FAMILY_NAMES)
def test_rows_of_an_adapter_are_those_of_the_model_that_peft_merges(tmp_path, family):
    base = tiny_models.save_model(tmp_path / "base", family)
    targets = TARGETS.get(family, "all-linear")
    path = tiny_models.save_adapter(base, tmp_path / "adapter", targets=targets, rank_pattern={r"\w+\.0\..*": 3})
    weights = open_weights(path, base)
    assert set(weights.adapter.modules) == set(weights.modules)
    for name, weight in reference(tiny_models.merged_model(base, path), weights).items():
        assert torch.allclose(weights.rows(name, ALL), weight, rtol=0, atol=1e-6)
        assert not torch.allclose(weights.base.rows(name, ALL), weight, rtol=0, atol=1e-2)
        factors = weights.factors(name)
        update = weights.rows(name, ALL) - weights.base.rows(name, ALL)
        assert torch.allclose(update, factors.scale * factors.B @ factors.A, rtol=0, atol=1e-6)


def test_modules_without_adapter_are_those_of_the_base(tmp_path, pairs):
    base = pairs["llama"][0]
    weights = open_weights(tiny_models.save_adapter(base, tmp_path, targets=["q_proj"]), base)
    for name, linear in weights.modules.items():
        assert (weights.factors(name) is None) == (linear.kind != "q_proj")
        assert torch.equal(weights.rows(name, ALL), weights.base.rows(name, ALL)) == (linear.kind != "q_proj")


d = 16
indices = st.one_of(
    st.slices(d),
    st.lists(st.integers(0, d - 1), max_size=24).map(lambda rows: torch.tensor(rows, dtype=torch.int64)),
    st.lists(st.integers(0, d - 1), max_size=24).map(lambda rows: torch.tensor(rows, dtype=torch.uint8)),
    st.lists(st.booleans(), min_size=d, max_size=d).map(torch.tensor),
)


@pytest.mark.parametrize(
    ("family", "module"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=indices)
def test_any_index_gives_the_same_rows_as_the_whole(pairs, family, module, index):
    base, adapter = pairs[family]
    for weights in (open_weights(base), open_weights(adapter, base)):
        whole = weights.rows(module, ALL)
        numbers = torch.tensor(range(d)[index], dtype=torch.int64) if isinstance(index, slice) else index
        numbers = numbers if numbers.dtype == torch.bool else numbers.to(torch.int64)
        rows = weights.rows(module, index)
        assert rows.dtype == torch.float32
        assert torch.allclose(rows, whole[numbers], rtol=0, atol=1e-7)
        if isinstance(weights, CheckpointWeights):
            assert torch.equal(rows, whole[numbers])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([16]),
        torch.tensor([-1]),
        torch.tensor([[1]]),
        torch.tensor(1),
        torch.tensor([1.0]),
        torch.tensor([True] * 15),
        torch.tensor([True] * 17),
    ],
    ids=str,
)
def test_rows_outside_a_module_are_refused(pairs, family, index):
    base, adapter = pairs[family]
    for weights in (open_weights(base), open_weights(adapter, base)):
        module = next(name for name, linear in weights.modules.items() if linear.out_features == d)
        with pytest.raises(IndexError):
            weights.rows(module, index)


@pytest.mark.parametrize("gap", [0, 8, 1000])
@pytest.mark.parametrize("block", [1, 256, 10_000])
def test_scattered_rows_of_a_transposed_module_do_not_depend_on_how_they_are_read(pairs, monkeypatch, gap, block):
    weights, name = open_weights(pairs["gpt2"][0]), "transformer.h.0.attn.c_attn"
    whole = weights.rows(name, ALL)
    monkeypatch.setattr(weights_module, "GAP_BYTES", gap)
    monkeypatch.setattr(weights_module, "BLOCK_BYTES", block)
    index = torch.tensor([40, 3, 4, 5, 9, 47, 0, 3])
    assert torch.equal(weights.rows(name, index), whole[index])


def test_unknown_modules_are_refused(pairs):
    with pytest.raises(KeyError):
        open_weights(pairs["llama"][0]).rows("lm_head", ALL)


@pytest.mark.parametrize(
    ("family", "module"), [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
@pytest.mark.parametrize("index", [slice(4, 7), torch.tensor([4, 6, 5]), torch.tensor([0, 23, 0])])
def test_only_the_bytes_of_the_rows_are_read(pairs, monkeypatch, family, module, index):
    monkeypatch.setattr(weights_module, "GAP_BYTES", 0)
    weights = open_weights(pairs[family][0])
    counted: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, views: list[memoryview], offset: int) -> int:
        counted.append(preadv(descriptor, views, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    weights.rows(module, index)
    distinct = len(set(index.tolist())) if isinstance(index, torch.Tensor) else 3
    assert sum(counted) == 4 * distinct * weights.modules[module].in_features


@given(size=st.integers(1, 5000))
def test_row_blocks_cover_every_row_once_and_stay_small(pairs, size):
    for linear in open_weights(pairs["gpt2"][0]).modules.values():
        blocks = list(row_blocks(linear, size))
        assert [row for block in blocks for row in range(linear.out_features)[block]] == list(
            range(linear.out_features)
        )
        row_bytes = 4 * linear.in_features
        assert all((block.stop - block.start) * row_bytes <= max(size, row_bytes) for block in blocks)


# --- opening ---


def test_a_base_for_a_full_checkpoint_is_refused(pairs):
    base = pairs["llama"][0]
    with pytest.raises(AdapterError, match="given a base model"):
        open_weights(base, base)


def test_an_adapter_without_its_base_is_refused(pairs):
    base, adapter = pairs["llama"]
    with pytest.raises(AdapterError, match=f"needs its base model {base}"):
        open_weights(adapter)


def test_an_adapter_on_an_adapter_is_refused(pairs):
    adapter = pairs["llama"][1]
    with pytest.raises(AdapterError, match="itself an adapter"):
        open_weights(adapter, adapter)


def test_an_adapter_beside_a_full_checkpoint_is_ambiguous(pairs, tmp_path):
    base, adapter = pairs["llama"]
    path = Path(shutil.copytree(base, tmp_path / "both"))
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    with pytest.raises(AdapterError, match="ambiguous"):
        open_weights(path, base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32}, "for another base: it changes model.layers.0.mlp.down_proj as"),
        (
            {"num_hidden_layers": 1},
            "for another base: it changes model.layers.1.mlp.down_proj, which is no linear module",
        ),
        ({"num_hidden_layers": 3}, "targets model.layers.2.self_attn.q_proj .* but has no factors"),
    ],
)
def test_an_adapter_for_another_base_is_refused(pairs, tmp_path, changes, said):
    other = tiny_models.save_model(tmp_path / "other", "llama", **changes)
    adapter = tiny_models.save_adapter(pairs["llama"][0], tmp_path / "adapter", targets=["q_proj", "down_proj"])
    with pytest.raises(AdapterError, match=said):
        open_weights(adapter, other)


def test_an_adapter_for_another_family_is_refused(pairs):
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn\.c_attn, which is no linear module"):
        open_weights(pairs["gpt2"][1], pairs["llama"][0])


def test_an_adapter_on_the_output_head_is_refused(pairs, tmp_path):
    base = pairs["llama"][0]
    path = tiny_models.save_adapter(base, tmp_path, targets=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match="lm_head"):
        open_weights(path, base)


def test_an_adapter_with_a_missing_module_is_refused(pairs, tmp_path):
    base = pairs["llama"][0]
    path = tiny_models.save_adapter(base, tmp_path, targets=["up_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"targets model\.layers\.1\.mlp\.up_proj .* but has no factors"):
        open_weights(path, base)


# --- pairs ---


def test_variants_and_adapters_of_one_base_pair(pairs, tmp_path):
    base, adapter = pairs["llama"]
    variant = open_weights(tiny_models.save_variant(base, tmp_path, shard_size=6000))
    sources = [open_weights(base), variant, open_weights(adapter, base)]
    assert isinstance(sources[2], AdapterWeights)
    for one in sources:
        for other in sources:
            require_pair(one, other)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"intermediate_size": 20}, "mlp.gate_proj has shape"),
        ("llama", {"num_hidden_layers": 3}, "has a module model.layers.2"),
        ("llama", {"num_hidden_layers": 1}, "has a module model.layers.1"),
        ("gpt2", {}, "has a module"),
    ],
)
def test_models_that_do_not_pair_are_refused_with_the_first_difference(pairs, tmp_path, family, changes, said):
    one, other = open_weights(pairs["llama"][0]), open_weights(tiny_models.save_model(tmp_path, family, **changes))
    with pytest.raises(MismatchError, match=said):
        require_pair(one, other)
    with pytest.raises(MismatchError):
        require_pair(other, one)


def test_models_with_other_tokenizers_are_refused(pairs, tmp_path):
    base, adapter = pairs["llama"]
    path = Path(shutil.copytree(base, tmp_path / "model"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="token 'cat' has id"):
        require_pair(open_weights(base), open_weights(path))
    with pytest.raises(MismatchError, match="token 'cat' has id"):
        require_pair(open_weights(adapter, base), open_weights(path))
    # A tokenizer of its own goes before the base model's.
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    shutil.copyfile(path / "tokenizer.json", own / "tokenizer.json")
    require_pair(open_weights(own, base), open_weights(path))


def test_a_model_without_tokenizer_does_not_pair(pairs, tmp_path):
    bare = open_weights(tiny_models.save_model(tmp_path, "llama", tokenizer=False))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        require_pair(bare, open_weights(pairs["llama"][0]))
