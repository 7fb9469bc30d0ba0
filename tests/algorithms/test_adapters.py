"""Adapters mean what PEFT takes them to mean; what is no plain LoRA update is refused by name."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from algorithms.adapters import Adapter, is_adapter
from algorithms.errors import AdapterError, CheckpointError, UnsupportedModelError
from neuronledger import NeuronLedgerError
from tests import tiny_models

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_adapter(base, tmp_path_factory.mktemp("adapter"), targets=["q_proj", "down_proj"])


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def peft_layers(base: Path, adapter: Path) -> dict[str, peft.tuners.lora.LoraLayer]:
    """The LoRA layers that PEFT makes of an adapter, by canonical module name."""
    with tiny_models.quiet():
        model = peft.PeftModel.from_pretrained(tiny_models.load_model(base), adapter)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def assert_same_as_peft(base: Path, path: Path) -> Adapter:
    adapter, layers = Adapter.open(path), peft_layers(base, path)
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        A, B, scale = adapter.factors(name)
        assert (adapter.modules[name].rank, adapter.modules[name].scale) == (len(A), scale)
        assert scale == layer.scaling["default"]
        assert adapter.modules[name].alpha == layer.lora_alpha["default"]
        assert A.dtype == B.dtype == torch.float32
        assert torch.equal(A, layer.lora_A["default"].weight)
        assert torch.equal(B, layer.lora_B["default"].weight)
    return adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6}, "use_rslora": True},
        {"rank_pattern": {"^model.layers.1.mlp.down_proj": 1}, "alpha_pattern": {r"model\.layers\.\d+\.mlp.*": 16}},
        {"rank_pattern": {"proj": 2}, "alpha_pattern": {"_proj": 3}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["0.mlp.down_proj"]},
        {"exclude_modules": r".*\.1\.self_attn\.q_proj"},
        {"targets": r"model\.layers\.0\..*_proj"},
        {"targets": "all-linear"},
        {"targets": ["model.layers.1.mlp.up_proj"]},
        {"dtype": torch.bfloat16},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_ranks_scales_factors_and_modules_are_those_of_peft(base, tmp_path, options):
    options = {"targets": ["q_proj", "down_proj"], **options}
    path = tiny_models.save_adapter(base, tmp_path, **options)
    adapter = assert_same_as_peft(base, path)
    assert {name for name in dict(tiny_models.load_model(base).named_modules()) if adapter.targets(name)} == set(
        adapter.modules
    ) or options["targets"] == "all-linear"


def test_patterns_that_peft_saves_in_another_order_are_refused_as_peft_refuses_them(base, tmp_path):
    # PEFT sorts the patterns when it saves them, so the first match is another one when the adapter is loaded.
    patterns = {"q_proj": 6, "layers.1.self_attn.q_proj": 2}
    path = tiny_models.save_adapter(base, tmp_path, targets=["q_proj"], rank_pattern=patterns)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_layers(base, path)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj .* has rank 6, .* gives it rank 2"):
        Adapter.open(path)


def test_factors_of_a_module_without_adapter_are_refused(saved):
    with pytest.raises(AdapterError, match=r"no adapter for model\.layers\.0\.mlp\.up_proj"):
        Adapter.open(saved).factors("model.layers.0.mlp.up_proj")


def test_a_directory_is_told_apart_by_its_adapter_config(base, saved):
    assert is_adapter(saved)
    assert not is_adapter(base)
    assert Adapter.open(saved).base_model == str(base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "PEFT type 'IA3'"),
        ({"peft_type": None}, "PEFT type None"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trained embeddings"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "replicated layers"),
        ({"target_parameters": ["mlp.weight"]}, "parameters instead of modules"),
        ({"init_lora_weights": "pissa"}, "initialisation 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialisation 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "initialisation 'olora'"),
        ({"init_lora_weights": "loftq"}, "initialisation 'loftq'"),
        ({"init_lora_weights": ["gaussian"]}, "initialisation"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"a_later_invention": {"x": 1}}, "setting a_later_invention, unknown here"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(adapter, changes, said):
    change_config(adapter, **changes)
    with pytest.raises(AdapterError, match=f"{said}.*merge_and_unload"):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_adapters_that_peft_saves_with_more_than_lora_are_refused(tmp_path, options):
    base = tiny_models.save_model(tmp_path / "base", attention_bias=True)
    path = tiny_models.save_adapter(base, tmp_path / "adapter", targets=["q_proj"], **options)
    with pytest.raises(AdapterError):
        Adapter.open(path)
    # The tensors alone give them away, whatever the config says.
    change_config(path, **{key: "none" if key == "bias" else None for key in options})
    with pytest.raises(AdapterError, match="tensor base_model"):
        Adapter.open(path)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"]])
def test_adapted_embeddings_are_refused(base, tmp_path, targets):
    path = tiny_models.save_adapter(base, tmp_path, targets=targets)
    with pytest.raises(AdapterError, match="embed"):
        Adapter.open(path)


def test_a_pickled_adapter_is_refused_unopened(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"\.bin files are not opened"):
        Adapter.open(adapter)


def test_missing_and_damaged_files_are_refused(adapter):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        Adapter.open(adapter)
    (adapter / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match=CONFIG):
        Adapter.open(adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=CONFIG):
        Adapter.open(adapter)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("factor", ["A", "B"])
def test_half_a_pair_of_factors_is_named(adapter, factor):
    change_tensors(adapter, lambda tensors: tensors.pop(f"{Q}.lora_{factor}.weight"))
    with pytest.raises(AdapterError, match=rf"has no {Q}\.lora_{factor}\.weight"):
        Adapter.open(adapter)


def test_an_empty_adapter_is_refused(adapter):
    change_tensors(adapter, dict.clear)
    with pytest.raises(AdapterError, match="adapts no module"):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    ("factor", "shape", "said"),
    [
        ("A", (3, 16), "have no product"),
        ("A", (4, 16, 1), "have no product"),
        ("B", (16, 3), "have no product"),
        ("B", (0, 4), "have no product"),
    ],
)
def test_factors_without_a_product_are_refused(adapter, factor, shape, said):
    change_tensors(adapter, lambda tensors: tensors.update({f"{Q}.lora_{factor}.weight": torch.zeros(shape)}))
    with pytest.raises(AdapterError, match=said):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 5}, "has rank 4, but adapter_config.json gives it rank 5"),
        ({"rank_pattern": {"q_proj": 2}}, "gives it rank 2"),
        ({"r": "4"}, "not a number"),
        ({"lora_alpha": None}, "not a number"),
        ({"lora_alpha": float("nan")}, "not a number"),
        ({"lora_alpha": True}, "not a number"),
        ({"lora_alpha": 10**400}, "not a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern .* is not an object"),
        ({"alpha_pattern": {"(": 2}}, "broken pattern"),
        ({"target_modules": ["k_proj"]}, "target_modules leaves it out"),
        ({"target_modules": None}, "target_modules leaves it out"),
        ({"target_modules": "("}, "broken pattern"),
        ({"target_modules": {"q_proj": 1}}, "neither a pattern nor a list"),
        ({"exclude_modules": ["q_proj"]}, "target_modules leaves it out"),
        ({"layers_to_transform": [1]}, "target_modules leaves it out"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "target_modules leaves it out"),
        ({"layers_to_transform": {"0": 1}}, "not a list of indices"),
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(adapter, changes, said):
    change_config(adapter, **changes)
    with pytest.raises(AdapterError, match=said):
        Adapter.open(adapter)


def test_quantised_factors_are_refused(adapter):
    change_tensors(
        adapter, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 16, dtype=torch.int8)})
    )
    with pytest.raises(UnsupportedModelError, match="dtype I8"):
        Adapter.open(adapter)


NUMBERS = st.integers() | st.just(10**400) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text("qprojs.*()[]+?0", max_size=6)
NAMES = st.text("q_proj(*", max_size=6)
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(NAMES, LEAVES, max_size=3)
KEYS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "bias",
    "layers_to_transform", "layers_pattern", "use_rslora", "init_lora_weights", "base_model_name_or_path", "use_dora",
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_a_random_config_never_does_more_than_raise(saved, adapter, changes):
    shutil.copyfile(saved / CONFIG, adapter / CONFIG)
    change_config(adapter, **changes)
    try:
        Adapter.open(adapter)
    except NeuronLedgerError:
        return
