"""Tensors that hold a block of a file for a moment, in the memory that blocks share (`algorithms.buffers`)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from algorithms.buffers import BUFFER_BYTES, lent


def empty_block(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor with anything in it. What is much smaller than a buffer, or larger, gets memory of its own."""
    size = math.prod(shape) * dtype.itemsize
    if not BUFFER_BYTES // 8 <= size <= BUFFER_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(lent(size), dtype=dtype).view(shape)


def block_copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of values in a dtype, rounded to nearest where that is narrower."""
    return empty_block(values.shape, dtype).copy_(values)
