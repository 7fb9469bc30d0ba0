"""What the changed rows of one module come to: how many kept their bytes, and norms before, after and of the change."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.block_tensors import block_copy
from algorithms.differences import squared_norm


@dataclass(frozen=True)
class ModuleOutcome:
    """What the computed rows of one module came to.

    Attributes:
        rows: rows claimed.
        rows_unchanged: rows whose bytes are the same after rounding to the file's dtype.
        change_norm: Frobenius norm of new minus old rows, in the file's coordinates.
        norm_before, norm_after: Frobenius norms of the rows in the file's coordinates.
    """

    module: str
    rows: int
    rows_unchanged: int
    change_norm: float
    norm_before: float
    norm_after: float


class RowFigures:
    """Figures of one module's rows, gathered block by block; `rows` counts them."""

    def __init__(self, module: str) -> None:
        self._module = module
        self.rows = self._unchanged = 0
        self._change = self._before = self._after = 0.0

    def add(self, old: Tensor, new: Tensor) -> None:
        """Count a block of rows, old (n, width) and new (n, width + extension) in the file's dtype."""
        wide = widened(old, new.shape[1])
        self.rows += len(new)
        self._unchanged += len(new) - int(differing_rows(wide, new).sum())
        after = block_copy(new, torch.float32)
        self._after += _squares(after)
        change = block_copy(wide, torch.float32)
        self._before += _squares(change)
        self._change += _squares(change.sub_(after))

    def outcome(self) -> ModuleOutcome:
        """Return the figures of all rows so far."""
        return ModuleOutcome(
            module=self._module,
            rows=self.rows,
            rows_unchanged=self._unchanged,
            change_norm=self._change**0.5,
            norm_before=self._before**0.5,
            norm_after=self._after**0.5,
        )


def _squares(rows: Tensor) -> float:
    """‖rows‖_F² of (n, width) float32: of each row in float32, or all in float64 where that is too narrow."""
    total = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    return total if math.isfinite(total) else squared_norm(rows)


def widened(rows: Tensor, width: int) -> Tensor:
    """Return rows (n, w) with zeros up to a width: what they are once lora_A has gained rows."""
    if rows.shape[1] == width:
        return rows
    return torch.cat([rows, rows.new_zeros(len(rows), width - rows.shape[1])], dim=1)


def differing_rows(old: Tensor, new: Tensor) -> Tensor:
    """Return which rows of two tensors (n, width) of one dtype differ in a byte, bool (n,): zeros of other sign do."""
    size = old.shape[1] * old.element_size()
    whole = next(kind for kind in (torch.int64, torch.int32, torch.int16) if size % kind.itemsize == 0)
    one, other = (rows.contiguous().view(whole).numpy() for rows in (old, new))
    return torch.from_numpy((one != other).any(axis=1))
