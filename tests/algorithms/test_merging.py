"""A merged checkpoint is PEFT's, in the base's files, and appears whole or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from algorithms import model_files
from algorithms.checkpoints import Checkpoint
from algorithms.errors import AdapterError, CheckpointError, NonFiniteError
from algorithms.merging import merge_adapter
from algorithms.weights import open_weights
from tests import tiny_models


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per tensor even in tiny models."""
    monkeypatch.setattr(model_files, "BLOCK_BYTES", 500)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    base = tiny_models.save_model(root / "base", dtype=torch.bfloat16, shard_size=4000)
    return base, tiny_models.save_adapter(base, root / "adapter", targets=["q_proj", "down_proj"])


def state(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3"])
def test_the_merged_model_is_the_one_that_peft_merges(tmp_path, family):
    base = tiny_models.save_model(tmp_path / "base", family, shard_size=5000)
    targets = r".*language_model\.layers.*_proj" if family == "gemma3" else "all-linear"
    adapter = tiny_models.save_adapter(base, tmp_path / "adapter", targets=targets)
    output = merge_adapter(base, adapter, tmp_path / "new" / "merged")
    expected, found = tiny_models.merged_model(base, adapter), tiny_models.load_model(output)
    for (name, one), (other_name, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.allclose(expected(tokens).logits, found(tokens).logits, atol=1e-4)


def test_files_layout_and_untouched_tensors_are_those_of_the_base(tmp_path, pair):
    base, adapter = pair
    written: list[int] = []
    output = merge_adapter(base, adapter, tmp_path / "merged", progress=written.append)
    assert {file.name for file in output.iterdir()} == {file.name for file in base.iterdir()}
    before, after, weights = Checkpoint.open(base), Checkpoint.open(output), open_weights(adapter, base)
    assert after.tensors == before.tensors
    assert after.metadata == before.metadata
    assert sum(written) == sum(tensor.end - tensor.begin for tensor in after.tensors.values())
    changed = {weights.modules[name].tensor for name in weights.adapter.modules}
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (output / file.name).read_bytes() == file.read_bytes()
    for name, tensor in state(output).items():
        if name in changed:
            module = name.removesuffix(".weight")
            expected = weights.rows(module, slice(None))
            assert torch.allclose(tensor.float(), expected, rtol=2**-8, atol=1e-7)
            assert (tensor == expected.to(torch.bfloat16)).float().mean() > 0.99
        else:
            assert torch.equal(tensor, before.read(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_written_throughout(tmp_path, pair, dtype):
    base, adapter = pair
    output = merge_adapter(base, adapter, tmp_path / "merged", dtype)
    before, after, weights = Checkpoint.open(base), Checkpoint.open(output), open_weights(adapter, base)
    assert after.weight_files == before.weight_files
    assert after.metadata == before.metadata
    assert after.config["dtype"] == str(dtype).removeprefix("torch.")
    assert after.config["hidden_size"] == before.config["hidden_size"]
    modules = {module.tensor: name for name, module in weights.modules.items()}
    for name, tensor in after.tensors.items():
        found = after.read(name)
        assert found.dtype == dtype
        source = weights.rows(modules[name], slice(None)) if name in modules else before.read(name)
        # How many rows are multiplied at once may change the last bit of a product.
        assert torch.allclose(found.float(), source.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        assert tensor.begin % dtype.itemsize == 0
    model = tiny_models.load_model(output, "auto")
    assert model.dtype == dtype


def test_the_adapters_own_tokenizer_goes_before_the_bases(tmp_path, pair):
    base, adapter = pair[0], Path(shutil.copytree(pair[1], tmp_path / "adapter"))
    tokenizer = tiny_models.build_tokenizer(chat_template="{{ messages }}")
    tokenizer.save_pretrained(adapter)
    output = merge_adapter(base, adapter, tmp_path / "merged")
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (output / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


def test_a_full_checkpoint_is_no_adapter(tmp_path, pair):
    with pytest.raises(AdapterError):
        merge_adapter(pair[0], pair[0], tmp_path / "merged")


def test_nothing_that_exists_is_overwritten(tmp_path, pair):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for output in (tmp_path / "full", tmp_path / "file", pair[0]):
        with pytest.raises(CheckpointError, match="not an empty directory"):
            merge_adapter(*pair, output)
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(merge_adapter(*pair, tmp_path / "empty"))


def test_other_dtypes_are_refused(tmp_path, pair):
    with pytest.raises(ValueError, match="float64"):
        merge_adapter(*pair, tmp_path / "merged", torch.float64)


@pytest.mark.parametrize("count", range(0, 40, 7))
def test_an_interrupted_merge_leaves_nothing(tmp_path, pair, count):
    blocks: list[int] = []

    def interrupt(size: int) -> None:
        blocks.append(size)
        if len(blocks) > count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(*pair, tmp_path / "merged", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, pair, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files.os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        merge_adapter(*pair, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_weight_that_does_not_fit_is_refused(tmp_path):
    base = tiny_models.save_model(tmp_path / "base")
    adapter = tiny_models.save_adapter(base, tmp_path / "adapter", targets=["q_proj"], alpha=10**8)
    with pytest.raises(NonFiniteError, match="q_proj"):
        merge_adapter(base, adapter, tmp_path / "merged", torch.float16)
    assert not (tmp_path / "merged").exists()
