"""Effective weights of a registered model, read row block by row block.

A row is a neuron: row i of the effective weight `W` of shape `(out, in)`, whichever way the file stores it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from algorithms.adapters import Adapter, is_adapter
from algorithms.architectures import LinearModule, discover
from algorithms.block_tensors import block_copy
from algorithms.checkpoints import BLOCK_BYTES, SINGLE, TORCH_DTYPES, Checkpoint
from algorithms.errors import AdapterError, MismatchError
from algorithms.tokenizer_content import TokenizerContent

_ANOTHER_BASE = "Give the base model that this adapter was trained on"
GAP_BYTES = 8192
"""Unwanted bytes between two wanted pieces of a stored row that are read along: a second read costs about as much."""


@dataclass(frozen=True)
class LoraFactors:
    """Factors of a LoRA update `scale · B A`: A `(r, k)` and B `(d, r)`, float32."""

    A: Tensor
    B: Tensor
    scale: float


class WeightSource(Protocol):
    """Effective weights of one registered model."""

    @property
    def path(self) -> Path:
        """Directory of the model (of the adapter, when it is one)."""

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        """Linear modules of the transformer blocks by name, ordered by block."""

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Rows of an effective weight, float32 `(n, in)`, in the order of the index."""

    def factors(self, module: str) -> LoraFactors | None:
        """Factors of a module's LoRA update; None for a full checkpoint or a module without adapter."""


class CheckpointWeights:
    """Weights of a full checkpoint.

    Raises:
        UnsupportedModelError: the family is not reached.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._modules = MappingProxyType({module.name: module for module in discover(checkpoint)})

    @property
    def path(self) -> Path:
        """Directory of the checkpoint."""
        return self.checkpoint.path

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        """Linear modules of the transformer blocks by name, ordered by block."""
        return self._modules

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Rows of a weight, float32 `(n, in)`; only their bytes are read.

        Args:
            module: name of the module.
            index: a slice, or a one-dimensional tensor of row numbers (any order, repeats allowed) or of booleans.

        Raises:
            KeyError: there is no such module.
            IndexError: a row is outside the module.
            CheckpointError: the file cannot be read.
        """
        linear = self._modules[module]
        wanted = plain_index(index, linear)
        if isinstance(wanted, slice):
            return self._span(linear, wanted.start, wanted.stop)
        if not len(wanted):
            return torch.empty((0, linear.in_features))
        if bool((np.diff(wanted.numpy()) > 0).all()):
            return self._distinct(linear, wanted)
        rows, order = torch.unique(wanted, return_inverse=True)
        return self._distinct(linear, rows)[order]

    def factors(self, module: str) -> LoraFactors | None:
        """None: a full checkpoint has no factors."""
        del module
        return None

    def _distinct(self, linear: LinearModule, rows: Tensor) -> Tensor:
        """Sorted distinct rows of a module."""
        if linear.transposed:
            return self._columns(linear, rows)
        return block_copy(self.checkpoint.read_ranges(linear.tensor, _runs(rows)), torch.float32)

    def _columns(self, linear: LinearModule, rows: Tensor) -> Tensor:
        """Sorted distinct rows of a module whose rows are stored as columns."""
        item = TORCH_DTYPES[self.checkpoint.stored(linear.tensor).dtype].itemsize
        gap, width = max(1, GAP_BYTES // item), max(1, BLOCK_BYTES // (item * linear.in_features))
        spans = _spans(rows, gap, width)
        return torch.cat([self._span(linear, first, last)[picked - first] for first, last, picked in spans])

    def _span(self, linear: LinearModule, start: int, stop: int) -> Tensor:
        if linear.transposed:
            return self.checkpoint.read_columns(linear.tensor, start, stop).to(torch.float32).T.contiguous()
        return block_copy(self.checkpoint.read(linear.tensor, start, stop), torch.float32)


class AdapterWeights:
    """Weights of a base checkpoint with a LoRA adapter on it: `W + s B A`.

    Raises:
        AdapterError: the adapter belongs to another base: a module is missing there or has another shape, or
            a module that the adapter targets has no factors.
    """

    def __init__(self, adapter: Adapter, base: CheckpointWeights) -> None:
        self.adapter = adapter
        self.base = base
        _check_base(adapter, base)

    @property
    def path(self) -> Path:
        """Directory of the adapter."""
        return self.adapter.path

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        """Linear modules of the base model by name, ordered by block."""
        return self.base.modules

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Rows of an effective weight, float32 `(n, in)`: `W_i + s B_i A`, computed in float32."""
        wanted = plain_index(index, self.modules[module])
        rows = self.base.rows(module, wanted)
        factors = self.factors(module)
        if factors is None:
            return rows
        return rows.addmm_(factors.B[wanted], factors.A, alpha=factors.scale)

    def factors(self, module: str) -> LoraFactors | None:
        """Factors of a module's LoRA update; None for a module without adapter."""
        if module not in self.adapter.modules:
            return None
        return LoraFactors(*self.adapter.factors(module))


def open_weights(path: Path, base: Path | None = None) -> CheckpointWeights | AdapterWeights:
    """Open a full checkpoint, or an adapter on its base checkpoint.

    Args:
        path: the model's directory.
        base: where the adapter's base checkpoint is; None for a full checkpoint.

    Raises:
        AdapterError: an adapter without its base or with another one's, or a base for a full checkpoint.
        CheckpointError, UnsupportedModelError: as `Checkpoint.open` and `discover`.
    """
    if not is_adapter(path):
        if base is not None:
            raise AdapterError(
                f"{path} is given a base model but has no adapter_config.json", "Leave the base out for a full model"
            )
        return CheckpointWeights(Checkpoint.open(path))
    if (path / SINGLE).exists():
        raise AdapterError(
            f"{path} holds both an adapter and {SINGLE}, so which one is the model is ambiguous",
            "Put the adapter in a directory of its own",
        )
    adapter = Adapter.open(path)
    if base is None:
        raise AdapterError(
            f"{path} is an adapter and needs its base model {adapter.base_model or '(the config does not name it)'}",
            "Give the directory of its base model",
        )
    if is_adapter(base):
        raise AdapterError(f"the base {base} of {path} is itself an adapter", "Merge it into its own base first")
    return AdapterWeights(adapter, CheckpointWeights(Checkpoint.open(base)))


def require_pair(subject: WeightSource, other: WeightSource) -> None:
    """Refuse two models that cannot be compared neuron by neuron and token by token.

    Raises:
        MismatchError: names the first module, shape or token that differs.
        CheckpointError: one of them has no tokenizer.
    """
    mend = "Give two models of the same architecture and size, made from the same base"
    for name, module in subject.modules.items():
        twin = other.modules.get(name)
        if twin is None:
            raise MismatchError(f"{subject.path} has a module {name}, {other.path} has none", mend)
        mine, theirs = (module.out_features, module.in_features), (twin.out_features, twin.in_features)
        if mine != theirs:
            raise MismatchError(f"{name} has shape {mine} in {subject.path} and {theirs} in {other.path}", mend)
    surplus = next((name for name in other.modules if name not in subject.modules), None)
    if surplus is not None:
        raise MismatchError(f"{other.path} has a module {surplus}, {subject.path} has none", mend)
    difference = tokenizer_content(subject).first_difference(tokenizer_content(other))
    if difference is not None:
        raise MismatchError(
            f"the tokenizers of {subject.path} and {other.path} differ: {difference}",
            "Give models with the same tokenizer",
        )


def tokenizer_content(source: WeightSource) -> TokenizerContent:
    """The tokenizer beside a model; an adapter without one of its own uses its base model's.

    Raises:
        CheckpointError: there is none.
    """
    if isinstance(source, AdapterWeights) and not TokenizerContent.exists(source.path):
        return TokenizerContent.read(source.base.path)
    return TokenizerContent.read(source.path)


def row_blocks(module: LinearModule, bytes_per_block: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices that cover a module's rows, each at most `bytes_per_block` of float32 (at least one row)."""
    rows = max(1, bytes_per_block // (4 * module.in_features))
    for start in range(0, module.out_features, rows):
        yield slice(start, min(start + rows, module.out_features))


def plain_index(index: slice | Tensor, linear: LinearModule) -> slice | Tensor:
    """The rows of a module that an index means: a slice of step 1 with both ends, or row numbers in int64.

    Raises:
        IndexError: a row is outside the module, or the index is no list of row numbers.
    """
    d = linear.out_features
    if isinstance(index, slice):
        rows = range(d)[index]
        return (
            slice(rows.start, max(rows.start, rows.stop)) if rows.step == 1 else torch.tensor(rows, dtype=torch.int64)
        )
    if index.dim() != 1 or index.dtype.is_floating_point:
        raise IndexError(f"rows of {linear.name} are asked for by {index.dtype} of shape {tuple(index.shape)}")
    if index.dtype == torch.bool:
        if len(index) != d:
            raise IndexError(f"a mask of {len(index)} rows is given for {linear.name}, which has {d}")
        return index.nonzero().flatten()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < d:
        raise IndexError(f"a row outside the {d} of {linear.name} is asked for")
    return index.to(torch.int64)


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    """Half-open ranges that sorted distinct row numbers cover."""
    numbers = rows.numpy()
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts, lasts = numbers[np.append(0, breaks + 1)], numbers[np.append(breaks, -1)]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def _spans(rows: Tensor, gap: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """Split sorted distinct row numbers into spans `(first, last + 1, rows)`: a new one after a gap or a full width."""
    numbers = rows.tolist()
    start = 0
    for position in range(1, len(numbers) + 1):
        ends = position == len(numbers)
        if ends or numbers[position] - numbers[position - 1] > gap or numbers[position] - numbers[start] >= width:
            yield numbers[start], numbers[position - 1] + 1, rows[start:position]
            start = position


def _check_base(adapter: Adapter, base: CheckpointWeights) -> None:
    for name, lora in adapter.modules.items():
        linear = base.modules.get(name)
        if linear is None:
            raise AdapterError(
                f"{adapter.path} is an adapter for another base: it changes {name}, which is no linear module of a"
                f" transformer block of {base.path}",
                _ANOTHER_BASE,
            )
        found = (adapter.tensors[lora.b_tensor].shape[0], adapter.tensors[lora.a_tensor].shape[1])
        expected = (linear.out_features, linear.in_features)
        if found != expected:
            raise AdapterError(
                f"{adapter.path} is an adapter for another base: it changes {name} as {found}, but the module of"
                f" {base.path} is {expected}",
                _ANOTHER_BASE,
            )
    for name in base.modules:
        if name not in adapter.modules and adapter.targets(name):
            raise AdapterError(f"{adapter.path} targets {name} of {base.path} but has no factors for it", _ANOTHER_BASE)
