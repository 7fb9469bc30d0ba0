"""Checkpoints are read exactly, and what is missing, damaged or of another kind in their directory is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms import checkpoints
from algorithms.checkpoints import Checkpoint, find_nonfinite, require_finite
from algorithms.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from algorithms.weights import CheckpointWeights
from tests import tiny_models

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("whole"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("sharded"), shard_size=6000)


def copy_of(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


# --- what is read ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_rows_and_columns_are_read_exactly(tmp_path, dtype):
    path = tiny_models.save_model(tmp_path, dtype=dtype)
    checkpoint, reference = Checkpoint.open(path), load_file(path / WEIGHTS)
    assert set(checkpoint.tensors) == set(reference)
    for name, expected in reference.items():
        stored = checkpoint.tensors[name]
        found = checkpoint.read(name)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert torch.equal(checkpoint.read(name, 1, 5), expected[1:5])
        assert torch.equal(checkpoint.read(name, 3), expected[3:])
        assert torch.equal(checkpoint.read(name, None, 0), expected[:0])
        assert torch.equal(checkpoint.read_ranges(name, [(3, 5), (6, 6), (1, 2)]), expected[[3, 4, 1]])
        assert torch.equal(checkpoint.read_ranges(name, []), expected[:0])
        raw = (path / stored.file).read_bytes()[stored.begin : stored.end]
        assert raw == expected.view(torch.uint8).numpy().tobytes()
        if expected.dim() == 2:
            assert torch.equal(checkpoint.read_columns(name, 2, 7), expected[:, 2:7])


def test_reads_are_copies(whole):
    checkpoint = Checkpoint.open(whole)
    checkpoint.read("model.norm.weight").zero_()
    assert checkpoint.read("model.norm.weight").abs().sum() > 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 65), (3, 2), (65, 65)])
def test_rows_outside_a_tensor_are_refused(whole, start, stop):
    checkpoint = Checkpoint.open(whole)
    with pytest.raises(IndexError):
        checkpoint.read("model.embed_tokens.weight", start, stop)
    with pytest.raises(IndexError):
        checkpoint.read_columns("lm_head.weight", start, stop)
    with pytest.raises(IndexError):
        checkpoint.read_ranges("lm_head.weight", [(0, 1), (start, stop)])


def test_scattered_rows_open_their_file_once(whole, monkeypatch):
    weights = CheckpointWeights(Checkpoint.open(whole))
    name = "model.layers.0.mlp.gate_proj"
    every = weights.rows(name, slice(None))
    opened = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *given: opened.append(path) or real_open(path, *given))
    assert torch.equal(weights.rows(name, torch.tensor([20, 3, 5, 4, 20])), every[[20, 3, 5, 4, 20]])
    assert len(opened) == 1


def test_columns_of_a_vector_are_refused(whole):
    with pytest.raises(IndexError, match="not two dimensions"):
        Checkpoint.open(whole).read_columns("model.norm.weight", 0, 1)


def test_scalars_and_empty_tensors_are_read(tmp_path):
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "x": torch.arange(4.0)}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(IndexError):
        checkpoint.read("scalar", 0, 1)


def test_shards_are_one_checkpoint(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert len(checkpoint.weight_files) > 2
    assert list(checkpoint.weight_files) == sorted(path.name for path in sharded.glob("*.safetensors"))
    model = tiny_models.load_model(sharded)
    assert set(checkpoint.tensors) == set(model.state_dict())
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in model.state_dict().items())
    assert all(metadata == {"format": "pt"} for metadata in checkpoint.metadata.values())


def test_the_hugging_face_cache_is_read_through_its_links(sharded, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    checkpoint, direct = Checkpoint.open(snapshot), Checkpoint.open(sharded)
    assert checkpoint.tensors == direct.tensors
    assert torch.equal(checkpoint.read("lm_head.weight"), direct.read("lm_head.weight"))


def test_an_unknown_tensor_is_named(whole):
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        Checkpoint.open(whole).read("nothing")


# --- which directories are refused ---


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="not a directory"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"text"', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}', "[" * 10_000, b"\xff{}",
     "9" * 5000],
)  # fmt: skip
def test_a_damaged_config_is_refused(whole, tmp_path, content):
    path = copy_of(whole, tmp_path)
    (path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(path)


def test_a_missing_config_is_refused(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_pipe_in_place_of_a_file_does_not_block(whole, tmp_path, name):
    path = copy_of(whole, tmp_path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "tf_model.h5", "model-Q4.gguf"])
def test_weights_that_are_no_safetensors_are_refused_unopened(whole, tmp_path, name):
    path = copy_of(whole, tmp_path)
    (path / WEIGHTS).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UnsupportedModelError, match=f"{name}.*safe_serialization"):
        Checkpoint.open(path)


def test_a_pickle_beside_safetensors_is_never_opened(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    os.mkfifo(path / "pytorch_model.bin")
    assert Checkpoint.open(path).tensors == Checkpoint.open(whole).tensors


def test_a_directory_without_weights_is_refused(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpoint.open(path)
    save_file({}, path / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        Checkpoint.open(path)


# --- index ---


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", ".", "",
             "x\0.safetensors", "\n.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", 3, None, ["x"]],
)  # fmt: skip
def test_an_index_cannot_name_files_outside_its_directory(sharded, tmp_path, file):
    path = copy_of(sharded, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"outside")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of its directory"):
        Checkpoint.open(path)


def test_an_index_of_pickles_is_refused(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    (path / INDEX).write_text('{"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(UnsupportedModelError, match="not a safetensors file"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[", '{"weight_map": {"a": "b", "a": "c"}}']
)
def test_a_damaged_index_is_refused(sharded, tmp_path, content):  # fmt: skip
    path = copy_of(sharded, tmp_path)
    (path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(path)


def test_a_missing_shard_is_named(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        Checkpoint.open(path)


def test_shards_without_their_index_are_refused(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor"):
        Checkpoint.open(path)


def test_a_tensor_that_the_index_puts_elsewhere_is_named(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    index = json.loads((path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    absent = {**index["weight_map"], "model.layers.9.weight": files[0]}
    (path / INDEX).write_text(json.dumps({"weight_map": absent}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.weight' is not in"):
        Checkpoint.open(path)
    moved = {**index["weight_map"]}
    moved["lm_head.weight"] = next(file for file in files if file != moved["lm_head.weight"])
    (path / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight' is not in"):
        Checkpoint.open(path)


def test_a_tensor_that_the_index_leaves_out_is_named(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is not named by the index"):
        Checkpoint.open(path)


def test_a_tensor_in_two_shards_is_named(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    first, second = sorted(path.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    with pytest.raises(CheckpointError, match="stands in both"):
        Checkpoint.open(path)


def test_an_index_beside_an_unrelated_single_file_is_ambiguous(sharded, tmp_path):
    path = copy_of(sharded, tmp_path)
    save_file({"x": torch.zeros(1)}, path / WEIGHTS)
    with pytest.raises(CheckpointError, match="ambiguous"):
        Checkpoint.open(path)


def test_an_index_of_the_single_file_is_accepted(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    names = Checkpoint.open(path).tensors
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert Checkpoint.open(path).tensors == names


# --- quantised weights ---


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantisation_config_is_refused(whole, tmp_path, key, nested):
    path = copy_of(whole, tmp_path)
    config = json.loads((path / "config.json").read_text())
    quantised = {key: {"quant_method": "bitsandbytes"}}
    config.update({"text_config": quantised} if nested else quantised)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16, dtype=torch.int8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16, dtype=torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16, dtype=torch.float8_e5m2)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16, dtype=torch.float64)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(24, 16)),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.zeros(1)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.zeros(1)),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(1)),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.zeros(1)),
        ("model.layers.0.mlp.up_proj.SCB", torch.zeros(1)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.zeros(1)),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.zeros(1)),
    ],
)
def test_quantised_tensors_are_refused_by_name(whole, tmp_path, name, tensor):
    path = copy_of(whole, tmp_path)
    save_file({**load_file(path / WEIGHTS), name: tensor}, path / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match=name.replace(".", r"\.")):
        Checkpoint.open(path)


# --- NaN and infinity ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_nonfinite_tensor_is_found_wherever_it_is(sharded, tmp_path, monkeypatch, value):
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 100)
    path = copy_of(sharded, tmp_path)
    assert find_nonfinite(Checkpoint.open(path)) is None
    file = max(path.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name][-1, -1] = value
    save_file(tensors, file)
    assert find_nonfinite(Checkpoint.open(path)) == name
    with pytest.raises(NonFiniteError, match=name):
        require_finite(tensors[name], name, path)
    require_finite(torch.zeros(2), name, path)


def test_a_nonfinite_scalar_is_found(tmp_path):
    save_file({"scalar": torch.tensor(float("nan"))}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    assert find_nonfinite(Checkpoint.open(tmp_path)) == "scalar"


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(whole, tmp_path):
    path = copy_of(whole, tmp_path)
    checkpoint = Checkpoint.open(path)
    os.truncate(path / WEIGHTS, 4000)
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.end)
    with pytest.raises(CheckpointError, match="early"):
        checkpoint.read(last.name)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(last.name)
