"""Tensors measured by several threads: what comes of it, and when."""

from threading import Event

import pytest

from algorithms import parallel
from algorithms.digests import ExpectedContent, new_checksum
from algorithms.errors import CheckpointError
from algorithms.safetensors_files import StoredTensor
from governance import weight_state
from governance.weight_state import measure_tensors


def stored(name: str, end: int, file: str = "weights") -> StoredTensor:
    return StoredTensor(name, "U8", (end,), file, 0, end)


@pytest.mark.parametrize("threads", [1, 8])
def test_of_several_tensors_that_cannot_be_read_the_first_is_named(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(parallel, "THREADS", threads)
    (tmp_path / "weights").write_bytes(bytes(10))
    tensors = [stored("whole", 10), *(stored(name, 9 + place, name) for place, name in enumerate("bca"))]
    with pytest.raises(CheckpointError, match="/b cannot be read"):
        measure_tensors(tmp_path, tensors, {})


def test_a_tensor_that_has_the_expected_checksum_is_not_hashed(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(bytes(10))
    empty = new_checksum().hexdigest()
    checksum = new_checksum()
    checksum.update(bytes(4))
    hashed = []
    monkeypatch.setattr(weight_state, "digest_tensor", lambda _, tensor, __: hashed.append(tensor.name) or "its own")
    expected = {
        "first": ExpectedContent("expected", checksum.hexdigest()),
        "second": ExpectedContent("expected", empty),
    }
    found = measure_tensors(tmp_path, [stored("first", 4), stored("second", 4), stored("third", 4)], {}, expected)
    assert [tensor.digest for tensor in found] == ["expected", "its own", "its own"]
    assert sorted(hashed) == ["second", "third"]


def test_a_tensor_is_measured_while_the_next_is_still_to_come(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(bytes(10))
    measured = Event()
    digest_tensor = weight_state.digest_tensor

    def told(*arguments):
        digest = digest_tensor(*arguments)
        measured.set()
        return digest

    def coming():
        yield stored("first", 4)
        assert measured.wait(10)
        yield stored("second", 10)

    monkeypatch.setattr(weight_state, "digest_tensor", told)
    assert [tensor.name for tensor in measure_tensors(tmp_path, coming(), {})] == ["first", "second"]
