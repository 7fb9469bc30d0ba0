"""The table of families agrees with what transformers builds, saves and computes; the rest is refused by name."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from algorithms.architectures import coverage, discover, supported_model_types
from algorithms.checkpoints import Checkpoint
from algorithms.errors import CheckpointError, UnsupportedModelError
from neuronledger import NeuronLedgerError
from tests import tiny_models

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved tiny model of every family. Read only."""
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_models.save_model(root / name, name) for name in tiny_models.FAMILY_NAMES}


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Linear modules of the text model's blocks, found by type instead of by table."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"}
        and any(part.isdecimal() for part in name.split("."))
        and "vision_tower" not in name
    }


def copy_of(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def change_tensors(path: Path, change) -> Path:
    tensors = load_file(path / WEIGHTS)
    save_file(change(tensors), path / WEIGHTS, metadata={"format": "pt"})
    return path


def change_config(path: Path, **changes: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def rename(old: str, new: str):
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def test_a_tiny_model_of_every_family_in_the_table_is_tested():
    types = {getattr(transformers, name).model_type for name, _ in tiny_models.CONFIGURATIONS.values()}
    assert types == set(supported_model_types())


@pytest.mark.parametrize("family", tiny_models.FAMILY_NAMES)
def test_modules_are_exactly_the_linear_modules_of_the_blocks(saved, family):
    modules = discover(Checkpoint.open(saved[family]))
    expected = linear_modules(tiny_models.load_model(saved[family]))
    assert {module.name for module in modules} == set(expected)
    assert [module.block for module in modules] == sorted(module.block for module in modules)
    for module in modules:
        shape = tuple(expected[module.name].weight.shape)
        assert shape == ((module.in_features, module.out_features) if module.transposed else (
            module.out_features, module.in_features
        ))  # fmt: skip
        assert module.kind == module.name.rsplit(".", 1)[-1]
        assert f".{module.block}." in module.name
        assert module.transposed == (family == "gpt2")


@pytest.mark.parametrize("family", tiny_models.FAMILY_NAMES)
def test_modules_of_an_input_group_get_the_same_input_and_others_another(saved, family):
    model = tiny_models.load_model(saved[family])
    inputs: dict[str, torch.Tensor] = {}

    def record(name: str):
        return lambda _module, arguments: inputs.__setitem__(name, arguments[0].detach().flatten(0, -2))

    for name, module in linear_modules(model).items():
        module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        model(input_ids=torch.arange(5, 15).reshape(2, 5))
    groups = defaultdict(list)
    for module in discover(Checkpoint.open(saved[family])):
        groups[module.input_group].append(module.name)
    for first, members in groups.items():
        assert first == members[0]
        assert all(torch.equal(inputs[first], inputs[member]) for member in members)
    firsts = list(groups)
    for index, first in enumerate(firsts):
        for other in firsts[index + 1 :]:
            assert inputs[first].shape != inputs[other].shape or not torch.equal(inputs[first], inputs[other])


@pytest.mark.parametrize("family", tiny_models.FAMILY_NAMES)
def test_coverage_counts_every_parameter_once(saved, family):
    checkpoint = Checkpoint.open(saved[family])
    modules = discover(checkpoint)
    model = tiny_models.load_model(saved[family])
    found = coverage(checkpoint, modules)
    assert found.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.linear_parameters == sum(module.weight.numel() for module in linear_modules(model).values())
    assert 0 < found.share < 1
    assert not {module.tensor for module in modules} & set(found.outside_blocks)
    assert coverage(checkpoint, modules[:1]).linear_parameters == modules[0].out_features * modules[0].in_features


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gpt2", "transformer.", ""),
        ("llama", "model.", ""),
        ("gpt_neox", "gpt_neox.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("gemma3", "language_model.model.", "model.language_model."),
    ],
)
def test_checkpoints_saved_under_another_prefix_give_the_same_modules(saved, tmp_path, family, old, new):
    path = change_tensors(copy_of(saved[family], tmp_path / "model"), rename(old, new))
    before, after = discover(Checkpoint.open(saved[family])), discover(Checkpoint.open(path))
    assert [module.name for module in before] == [module.name for module in after]
    assert all(module.tensor.startswith(new) for module in after)
    reference = dict(tiny_models.load_model(path).named_modules())
    checkpoint = Checkpoint.open(path)
    assert all(torch.equal(checkpoint.read(module.tensor), reference[module.name].weight) for module in after)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}),
        ("gpt2", {"transformer.h.1.attn.masked_bias": torch.ones(())}),
        ("gpt_neox", {"gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
    ],
)  # fmt: skip
def test_buffers_of_old_versions_are_no_parameters(saved, tmp_path, family, buffers):
    path = change_tensors(copy_of(saved[family], tmp_path / "model"), lambda tensors: {**tensors, **buffers})
    checkpoint, before = Checkpoint.open(path), Checkpoint.open(saved[family])
    modules = discover(checkpoint)
    assert coverage(checkpoint, modules) == coverage(before, discover(before))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MixtralConfig", {"num_local_experts": 2}),
        ("Qwen2MoeConfig", {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
        ("Qwen3MoeConfig", {"num_experts": 2, "moe_intermediate_size": 8, "head_dim": 8}),
        ("GptOssConfig", {"num_local_experts": 2, "head_dim": 8}),
    ],
)
def test_mixtures_of_experts_are_refused(tmp_path, name, arguments):
    sizes = tiny_models.CONFIGURATIONS["llama"][1]
    config = getattr(transformers, name)(**{**sizes, **arguments, "pad_token_id": 0})
    tiny_models.write_model(tmp_path, transformers.AutoModelForCausalLM.from_config(config), tokenizer=False)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        discover(Checkpoint.open(tmp_path))


def test_experts_under_a_dense_model_type_are_refused(saved, tmp_path):
    path = change_config(copy_of(saved["llama"], tmp_path / "a"), num_local_experts=8)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        discover(Checkpoint.open(path))
    path = change_tensors(copy_of(saved["llama"], tmp_path / "b"), rename("0.mlp.up_proj", "0.mlp.experts.0.up_proj"))
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        discover(Checkpoint.open(path))


@pytest.mark.parametrize("model_type", ["mamba", "bloom", None, 3, ["llama"]])
def test_unknown_model_types_are_refused_and_the_known_ones_listed(saved, tmp_path, model_type):
    path = change_config(copy_of(saved["llama"], tmp_path / "model"), model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=r"not in the table.*gpt2.*llama.*qwen3"):
        discover(Checkpoint.open(path))


def test_a_missing_module_is_refused_by_name(saved, tmp_path):
    def drop(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        return tensors

    path = change_tensors(copy_of(saved["llama"], tmp_path / "model"), drop)
    with pytest.raises(UnsupportedModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        discover(Checkpoint.open(path))


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (12, 16)),
        ("model.layers.1.self_attn.k_proj.weight", (4, 16)),
        ("model.layers.1.mlp.down_proj.weight", (16, 25)),
        ("model.layers.0.self_attn.o_proj.weight", (16,)),
        ("model.layers.0.self_attn.o_proj.weight", (16, 4, 4)),
        ("model.layers.0.mlp.gate_proj.weight", (0, 16)),
    ],
)
def test_a_module_of_unexpected_shape_is_refused_by_name(saved, tmp_path, tensor, shape):
    path = change_tensors(
        copy_of(saved["llama"], tmp_path / "model"), lambda tensors: {**tensors, tensor: torch.zeros(shape)}
    )
    with pytest.raises(UnsupportedModelError, match=tensor.replace(".", r"\.")):
        discover(Checkpoint.open(path))


@pytest.mark.parametrize("family", ["mistral", "phi3", "gpt2", "opt", "gpt_neox"])
def test_a_config_of_another_size_is_refused(saved, tmp_path, family):
    keys = {"gpt2": "n_embd"}
    path = change_config(copy_of(saved[family], tmp_path / "model"), **{keys.get(family, "hidden_size"): 32})
    with pytest.raises(UnsupportedModelError, match="size is"):
        discover(Checkpoint.open(path))


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen2"])
def test_sizes_that_the_config_leaves_out_are_learned(saved, tmp_path, family):
    path = copy_of(saved[family], tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    for key in ("head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config))
    assert discover(Checkpoint.open(path)) == discover(Checkpoint.open(saved[family]))


def test_a_weight_inside_a_block_that_the_table_does_not_know_is_refused(saved, tmp_path):
    extra = {"model.layers.1.self_attn.gate.weight": torch.zeros(4, 16)}
    path = change_tensors(copy_of(saved["llama"], tmp_path / "model"), lambda tensors: {**tensors, **extra})
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.self_attn\.gate\.weight"):
        discover(Checkpoint.open(path))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.self_attn\.gate\.weight"):
        coverage(Checkpoint.open(path), ())


@pytest.mark.parametrize("block", ["2", "01", "x", "-1", "²"])
def test_a_block_outside_those_that_the_config_declares_is_refused(saved, tmp_path, block):
    extra = {f"model.layers.{block}.input_layernorm.weight": torch.zeros(16)}
    path = change_tensors(copy_of(saved["llama"], tmp_path / "model"), lambda tensors: {**tensors, **extra})
    with pytest.raises(CheckpointError, match="outside the 2 blocks"):
        discover(Checkpoint.open(path))


@pytest.mark.parametrize("count", [None, 0, -1, "2", 2.0, True])
def test_an_unusable_number_of_blocks_is_refused(saved, tmp_path, count):
    path = change_config(copy_of(saved["llama"], tmp_path / "model"), num_hidden_layers=count)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        discover(Checkpoint.open(path))


def test_blocks_under_two_prefixes_are_refused(saved, tmp_path):
    def both(tensors):
        return {**tensors, "h.0.attn.c_attn.weight": tensors["transformer.h.0.attn.c_attn.weight"].clone()}

    path = change_tensors(copy_of(saved["gpt2"], tmp_path / "model"), both)
    with pytest.raises(CheckpointError, match=r"both transformer\.h and h"):
        discover(Checkpoint.open(path))


def test_tensors_of_another_family_are_refused(saved, tmp_path):
    path = change_config(copy_of(saved["gpt2"], tmp_path / "model"), model_type="llama", num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match=r"no tensor under model\.layers"):
        discover(Checkpoint.open(path))


def test_a_nested_model_without_its_text_config_is_refused(saved, tmp_path):
    path = change_config(copy_of(saved["gemma3"], tmp_path / "model"), text_config=None)
    with pytest.raises(CheckpointError, match="text_config"):
        discover(Checkpoint.open(path))


NUMBERS = st.integers() | st.floats()
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=3) | st.lists(NUMBERS, max_size=2)
KEYS = st.sampled_from(
    ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_experts", "text_config"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES), max_size=2))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_random_config_never_does_more_than_raise(saved, family, changes):
    checkpoint = Checkpoint.open(saved[family])
    changed = replace(checkpoint, config={**checkpoint.config, **changes})
    try:
        modules = discover(changed)
    except NeuronLedgerError:
        return
    assert modules == discover(checkpoint)
