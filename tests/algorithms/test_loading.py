"""Loading models and finding their modules behind a PEFT wrapper."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms.errors import AdapterError, CheckpointError, UnsupportedModelError
from algorithms.laboratory.tokenizer import word_tokenizer
from algorithms.loading import blocks, linear_module, load_model, unwrapped

MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "base"
    tokenizer = word_tokenizer(["one", "two"])
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(checkpoint):
    path = checkpoint.parent / "adapter"
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(path)
    return path


def altered(checkpoint, path, change):
    """A copy of the checkpoint with changed tensors."""
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_loaded_model_is_ready_for_inference(checkpoint):
    model, tokenizer = load_model(checkpoint, None)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.convert_tokens_to_ids("two") == len(tokenizer) - 1


def test_weights_are_converted_to_the_asked_type_or_kept(checkpoint, tmp_path):
    def halve(tensors):
        tensors.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})

    half = altered(checkpoint, tmp_path / "half", halve)
    config = json.loads((half / "config.json").read_text())
    config.update(dtype="bfloat16", torch_dtype="bfloat16")
    (half / "config.json").write_text(json.dumps(config))
    assert linear_module(load_model(half, None)[0], MODULE).weight.dtype == torch.float32
    assert linear_module(load_model(half, None, dtype=None)[0], MODULE).weight.dtype == torch.bfloat16


def test_hooks_on_an_adapted_module_see_the_effective_weight(checkpoint, adapter):
    model, tokenizer = load_model(adapter, checkpoint)
    seen = {}
    module = linear_module(model, MODULE)
    handle = module.register_forward_hook(lambda _module, args, output: seen.update(x=args[0], y=output))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    handle.remove()
    factors = load_file(adapter / "adapter_model.safetensors")
    B = factors[f"base_model.model.{MODULE}.lora_B.weight"]
    A = factors[f"base_model.model.{MODULE}.lora_A.weight"]
    base = load_file(checkpoint / "model.safetensors")[f"{MODULE}.weight"]
    scale = 8 / 2  # PEFT's default lora_alpha over the rank
    assert torch.allclose(seen["y"], seen["x"] @ (base + scale * B @ A).T, atol=1e-5)
    assert tokenizer.eos_token_id is not None


def test_blocks_are_the_same_behind_a_wrapper(checkpoint, adapter):
    plain, _ = load_model(checkpoint, None)
    wrapped, _ = load_model(adapter, checkpoint)
    assert len(blocks(plain)) == len(blocks(wrapped)) == 3
    assert blocks(wrapped)[1] is unwrapped(wrapped).get_submodule("model.layers.1")


def test_an_unknown_module_is_refused_by_name(checkpoint):
    model, _ = load_model(checkpoint, None)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.9"):
        linear_module(model, "model.layers.9.mlp.down_proj")


def test_a_model_without_a_list_of_blocks_is_refused(checkpoint):
    model, _ = load_model(checkpoint, None)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="7 transformer blocks"):
        blocks(model)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere", None)


def test_missing_tensors_are_not_filled_with_random_numbers(checkpoint, tmp_path):
    broken = altered(checkpoint, tmp_path / "broken", lambda tensors: tensors.pop(f"{MODULE}.weight"))
    with pytest.raises(CheckpointError, match=MODULE):
        load_model(broken, None)


def test_pickled_weights_are_refused(checkpoint, tmp_path):
    pickled = altered(checkpoint, tmp_path / "pickled", lambda tensors: None)
    tensors = load_file(pickled / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        load_model(pickled, None)


def test_a_truncated_weight_file_is_refused(checkpoint, tmp_path):
    short = altered(checkpoint, tmp_path / "short", lambda tensors: None)
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="short"):
        load_model(short, None)


def test_an_adapter_without_safetensors_is_refused(checkpoint, adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_model(tmp_path, checkpoint)


def test_a_directory_without_a_tokenizer_is_refused(checkpoint, tmp_path):
    bare = altered(checkpoint, tmp_path / "bare", lambda tensors: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_model(bare, None)
