"""Digests agree with plain SHA-256 however a file is cut up, and change when and only when content changes."""

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from algorithms import digests
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.digests import (
    ExpectedContent,
    digest_file,
    digest_tensor,
    digest_weight_file,
    has_content,
    named_digest,
    new_checksum,
    new_hash,
    state_digest,
    tokenizer_digest,
    tree_digest,
)
from algorithms.errors import CheckpointError
from algorithms.tokenizer_content import TokenizerContent
from tests import tiny_models


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blake(content: bytes) -> str:
    return blake3(content).hexdigest()


def stored(name: str, begin: int, end: int) -> StoredTensor:
    return StoredTensor(name, "U8", (end - begin,), "weights", begin, end)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=8), chunk=st.integers(1, 50))
def test_one_pass_gives_the_digests_of_separate_passes(tmp_path, monkeypatch, content, cuts, chunk):
    monkeypatch.setattr(digests, "CHUNK_BYTES", chunk)
    path = tmp_path / "weights"
    path.write_bytes(content)
    bounds = sorted({min(cut, len(content)) for cut in cuts})
    tensors = [stored(str(begin), begin, end) for begin, end in pairwise(bounds)]
    tensors += [stored("empty", bounds[0], bounds[0])] if bounds else []
    progress: list[int] = []
    found = digest_weight_file(path, reversed(tensors), progress.append)
    assert found.file == "weights"
    assert found.size == len(content) == sum(progress)
    assert found.sha256 == sha256(content) == digest_file(path)
    assert found.tensors == {tensor.name: blake(content[tensor.begin : tensor.end]) for tensor in tensors}
    for algorithm, plain in (("blake3", blake), ("sha256", sha256)):
        for tensor in tensors:
            assert digest_tensor(tmp_path, tensor, algorithm) == plain(content[tensor.begin : tensor.end])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(min_size=1, max_size=200), cuts=st.tuples(*[st.integers(0, 200)] * 2), flip=st.integers(0, 199)
)
def test_content_is_what_was_expected_until_a_byte_of_it_changes(tmp_path, content, cuts, flip):
    begin, end = sorted(min(cut, len(content)) for cut in cuts)
    flip %= len(content)
    path, tensor = tmp_path / "weights", stored("a", begin, end)
    path.write_bytes(content)
    checksum = new_checksum()
    checksum.update(content[begin:end])
    expected = ExpectedContent(blake(content[begin:end]), checksum.hexdigest())
    assert has_content(tmp_path, tensor, expected)
    path.write_bytes(content[:flip] + bytes([content[flip] ^ 1]) + content[flip + 1 :])
    assert has_content(tmp_path, tensor, expected) == (not begin <= flip < end)


def test_a_checksum_is_another_in_every_process():
    program = "from algorithms.digests import new_checksum; print(new_checksum().hexdigest())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(run.stdout.strip()) == len(new_checksum().hexdigest()) == 32
    assert run.stdout.strip() != new_checksum().hexdigest()


def test_digests_of_a_sharded_checkpoint_are_those_of_its_tensors(tmp_path):
    checkpoint = Checkpoint.open(tiny_models.save_model(tmp_path, shard_size=6000))
    for file in checkpoint.weight_files:
        tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.file == file]
        found = digest_weight_file(tmp_path / file, tensors)
        assert found.sha256 == sha256((tmp_path / file).read_bytes())
        for tensor in tensors:
            assert found.tensors[tensor.name] == blake(checkpoint.read(tensor.name).numpy().tobytes())


def test_a_file_that_ends_before_its_tensors_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="tensor a ends at 11"):
        digest_weight_file(path, [stored("a", 0, 11)])


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        digest_file(tmp_path / "missing")


STATE = {"b": ("F32", (2, 3), sha256(b"b")), "a": ("BF16", (4,), sha256(b"a"))}


def test_the_state_digest_does_not_depend_on_order():
    assert state_digest(STATE) == state_digest(dict(reversed(STATE.items())))
    canonical = f'[["a","BF16",[4],"{sha256(b"a")}"],["b","F32",[2,3],"{sha256(b"b")}"]]'
    assert state_digest(STATE) == sha256(canonical.encode())


@pytest.mark.parametrize(
    "changed",
    [
        {"a": STATE["a"]},
        {**STATE, "c": STATE["a"]},
        {**STATE, "a": ("F16", (4,), sha256(b"a"))},
        {**STATE, "a": ("BF16", (4, 1), sha256(b"a"))},
        {**STATE, "a": ("BF16", (4,), sha256(b"A"))},
        {"a": STATE["b"], "b": STATE["a"]},
        {"x": STATE["b"], "a": STATE["a"]},
    ],
)
def test_the_state_digest_changes_with_everything_it_covers(changed):
    assert state_digest(changed) != state_digest(STATE)


PARTS = [("b", sha256(b"b")), ("a", "blake3:" + blake(b"a"))]


def test_a_tree_digest_covers_header_names_and_tensors_in_any_order():
    found = tree_digest(sha256(b"head"), PARTS)
    assert found == tree_digest(sha256(b"head"), PARTS[::-1])
    others = [PARTS[:1], [("b", sha256(b"B")), PARTS[1]], [("c", PARTS[0][1]), PARTS[1]]]
    assert len({found, tree_digest(sha256(b"other"), PARTS), *(tree_digest(sha256(b"head"), o) for o in others)}) == 5


def test_a_digest_names_its_algorithm_and_an_unknown_one_is_refused():
    assert named_digest("ab", "sha256") == "ab"
    assert named_digest("ab", "blake3") == "blake3:ab"
    with pytest.raises(CheckpointError, match="'md5' is not known"):
        new_hash("md5")


# --- tokenizers ---


@pytest.fixture(scope="module")
def byte_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """tokenizer.json of a small byte-pair tokenizer, as the library writes it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<eos>"], vocab_size=40)
    tokenizer.train_from_iterator(["how do i feed a cat", "how do i make a cake", "hot cake"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    content: dict[str, Any] = json.loads(path.read_text())
    assert len(content["model"]["merges"]) > 5
    return content


def save(directory: Path, content: dict[str, Any], **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def copied(content: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(content))
    return result


def test_the_tokenizer_digest_ignores_layout_and_chat_template(tmp_path, byte_pair):
    digest = tokenizer_digest(save(tmp_path / "a", byte_pair))
    older = copied(byte_pair)
    older["version"] = "0.9"
    older["model"]["merges"] = [" ".join(merge) for merge in older["model"]["merges"]]
    older["model"]["vocab"] = dict(reversed(older["model"]["vocab"].items()))
    older["added_tokens"].reverse()
    older["truncation"] = {"max_length": 8}
    path = save(tmp_path / "b", older, chat_template__jinja="{{ messages }}", tokenizer_config__json="{}")
    assert tokenizer_digest(path) == digest
    assert TokenizerContent.read(path).first_difference(TokenizerContent.read(tmp_path / "a")) is None


def swap_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["c"] = vocabulary["c"], vocabulary["a"]


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def drop_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def add_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({"id": 99, "content": "[PAD]", "special": True})


def move_token(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["id"] = 98


def other_kind(content: dict[str, Any]) -> None:
    content["model"]["type"] = "WordPiece"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_ids, "token 'a' has id"),
        (swap_merges, "merge 0 is"),
        (drop_merge, "merges, the other"),
        (add_token, r"token '\[PAD\]' has no id in one and id 99 in the other"),
        (move_token, "token '<eos>' has id 1 in one and id 98"),
        (other_kind, "another kind of model"),
    ],
)
def test_the_tokenizer_digest_changes_with_what_decides_ids(tmp_path, byte_pair, change, said):
    changed = copied(byte_pair)
    change(changed)
    one = TokenizerContent.read(save(tmp_path / "a", byte_pair))
    other = TokenizerContent.read(save(tmp_path / "b", changed))
    assert one.digest != other.digest
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(one.first_difference(other))


def test_a_unigram_tokenizer_counts_pieces_and_their_probabilities(tmp_path):
    def content(score: float) -> dict[str, Any]:
        return {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", score]]}, "added_tokens": None}

    one, same, other = (
        TokenizerContent.read(save(tmp_path / name, content(score)))
        for name, score in (("a", -1.0), ("b", -1.0), ("c", -2.0))
    )
    assert one.digest == same.digest
    assert "token 'a'" in (one.first_difference(other) or "")


def test_slow_tokenizer_files_are_compared_by_content(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_text(content)
    assert tokenizer_digest(tmp_path / "a") == tokenizer_digest(tmp_path / "b") != tokenizer_digest(tmp_path / "c")
    one, other = TokenizerContent.read(tmp_path / "a"), TokenizerContent.read(tmp_path / "c")
    assert one.first_difference(other) == "their tokenizer files differ"


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizer_digest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": []},
        {"model": {"vocab": 3}},
        {"model": {"vocab": [["a"]]}},
        {"model": {"vocab": {}}, "added_tokens": {"a": 1}},
        {"model": {"vocab": {}}, "added_tokens": [{"content": "a"}]},
        {"model": {"vocab": {}}, "added_tokens": ["a"]},
        {"model": {"vocab": {}, "merges": [3]}},
        {"model": {"vocab": {}, "merges": 3}},
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer_digest(save(tmp_path, content))
