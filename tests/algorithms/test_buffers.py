"""Borrowed memory belongs to one borrower at a time, and is used again."""

import time
from mmap import mmap
from threading import get_ident

import pytest
import torch

from algorithms import buffers
from algorithms.block_tensors import block_copy, empty_block
from algorithms.buffers import BUFFER_BYTES, borrowed
from algorithms.digests import read_pieces
from algorithms.parallel import in_parallel


@pytest.fixture
def free(monkeypatch) -> list[mmap]:
    """The buffers that nobody has borrowed; none at first."""
    found: list[mmap] = []
    monkeypatch.setattr(buffers, "_free", found)
    return found


def test_memory_that_was_given_back_is_lent_again_and_never_twice_at_once(free):
    with borrowed(10) as first, borrowed(20) as second:
        assert (len(first), len(second), free) == (10, 20, [])
        assert first.obj is not second.obj
        known = {id(first.obj), id(second.obj)}
    with borrowed(BUFFER_BYTES) as again:
        assert (len(again), id(again.obj) in known, len(free)) == (BUFFER_BYTES, True, 1)


def test_memory_comes_back_after_an_error(free):
    with pytest.raises(ValueError, match="half read"), borrowed(1):
        raise ValueError("half read")
    assert len(free) == 1


def test_more_than_a_buffer_is_not_kept(free):
    with borrowed(BUFFER_BYTES + 1) as memory:
        assert len(memory) == BUFFER_BYTES + 1
    assert free == []


def test_no_other_thread_writes_to_what_a_thread_has_borrowed(free, monkeypatch):
    monkeypatch.setattr("algorithms.parallel.THREADS", 4)

    def untouched(part: int) -> bool:
        with borrowed(8) as memory:
            mine = (part ^ get_ident()).to_bytes(8, "little")
            memory[:] = mine
            time.sleep(0.0005)
            return bytes(memory) == mine

    assert all(in_parallel(untouched, range(200)))
    assert 1 <= len(free) <= 4


def test_reading_that_ends_early_gives_the_memory_back(free, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(100)))
    pieces = read_pieces(tmp_path / "weights", 10, 90, 30)
    assert bytes(next(pieces)) == bytes(range(10, 40))
    assert free == []
    pieces.close()
    assert len(free) == 1
    assert b"".join(bytes(piece) for piece in read_pieces(tmp_path / "weights", 10, 90, 30)) == bytes(range(10, 90))


def test_memory_under_a_tensor_is_lent_again_once_no_part_of_it_is_left(free):
    rows = block_copy(torch.ones(BUFFER_BYTES // 32, 4, dtype=torch.bfloat16), torch.float32)
    part, free_meanwhile = rows[2:4], len(free)
    del rows
    assert (free_meanwhile, len(free)) == (0, 0)
    another = empty_block((BUFFER_BYTES,), torch.uint8).fill_(7)
    assert torch.equal(part, torch.ones(2, 4))
    del part, another
    assert len(free) == 2
    assert len({id(buffer) for buffer in free}) == 2


@pytest.mark.parametrize("size", [0, 1, BUFFER_BYTES // 8 - 1, BUFFER_BYTES + 1])
def test_small_and_large_tensors_have_memory_of_their_own(free, size):
    tensor = empty_block((size,), torch.uint8)
    assert tensor.shape == (size,)
    del tensor
    assert free == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_is_rounded_as_torch_rounds(free, dtype):
    values = torch.randn(BUFFER_BYTES // 16, 3, generator=torch.Generator().manual_seed(1))
    copy = block_copy(values, dtype)
    assert torch.equal(copy, values.to(dtype))
    assert copy.data_ptr() != values.data_ptr()
