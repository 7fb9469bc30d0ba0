"""Bytes that follow one another in a file come to stand in several places, all of them or an error."""

import os

import pytest

from algorithms.errors import CheckpointError
from algorithms.safetensors_files import read_scattered


@pytest.mark.parametrize("most", [1, 7, 10**6])
def test_bytes_are_scattered_over_views_however_few_the_system_reads_at_once(tmp_path, monkeypatch, most):
    content = bytes(range(256)) * 20
    (tmp_path / "weights").write_bytes(content)
    read = os.preadv

    def part(descriptor: int, views: list[memoryview], begin: int) -> int:
        assert 0 < len(views) <= 1024  # IOV_MAX
        found = left = os.pread(descriptor, min(most, sum(map(len, views))), begin)
        for view in views:
            view[: len(left)], left = left[: len(view)], left[len(view) :]
        return len(found)

    monkeypatch.setattr(os, "preadv", read if most == 10**6 else part)
    memory = memoryview(bytearray(3 * 1500))
    views = [memory[start : start + 2] for start in range(0, len(memory), 3)]
    read_scattered(tmp_path / "weights", 11, views)
    assert b"".join(map(bytes, views)) == content[11 : 11 + 3000]
    assert bytes(memory[2::3]) == bytes(1500)
    with pytest.raises(CheckpointError, match="ends 2 bytes early"):
        read_scattered(tmp_path / "weights", len(content) - 4, views[:3])
