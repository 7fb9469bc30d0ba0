"""Memory for blocks of files, used again for the next block and by the next thread.

Each thread allocates from a heap of its own, and what a heap keeps of the blocks that were let go differs from run to
run; pages that the system gives anew can cost more than reading a file into them. So blocks share a few buffers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_COPY, mmap
from weakref import finalize

BUFFER_BYTES = 2**20
"""Size of a buffer; what asks for more than this gets memory of its own."""

_free: list[mmap] = []


@contextmanager
def borrowed(size: int) -> Iterator[memoryview]:
    """Memory of `size` bytes with anything in it, the caller's until it leaves; then another thread may write to it.

    There are never more buffers than were borrowed at once.
    """
    if size > BUFFER_BYTES:
        yield memoryview(bytearray(size))
        return
    buffer = _taken()
    try:
        yield memoryview(buffer)[:size]
    finally:
        _free.append(buffer)


def lent(size: int) -> memoryview:
    """Memory of `size` bytes with anything in it, at most a buffer, that is free again once the view is let go.

    What is made of the view must refer to it, as `torch.frombuffer` does; a part of it (`view[:n]`) does not.
    """
    buffer = _taken()
    view = memoryview(buffer)[:size]
    finalize(view, _free.append, buffer).atexit = False
    return view


def _taken() -> mmap:
    try:
        return _free.pop()
    except IndexError:
        # Whole pages of the process's own: aligned, and in memory only as far as they were written to.
        return mmap(-1, BUFFER_BYTES, access=ACCESS_COPY)
