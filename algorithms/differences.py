"""Differences of two models' weights for one module: the update U = W_t − W_a and the safety directions V = W_a − W_0.

Nothing dense is kept: rows are read when asked for, and where both models are adapters on one checkpoint (or one is an
adapter on the other) the difference is known by its low-rank factors, without the rounding of a subtraction.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.errors import NonFiniteError
from algorithms.weights import LoraFactors, WeightSource, row_blocks

# Half the usual block: a difference holds two operands and the result at once.
BLOCK_BYTES = 16 * 2**20
# What is read through once and let go: narrow modules fill a block too, so that memory does not depend on how wide a
# model is. Smaller blocks take time, larger ones memory.
STREAM_BYTES = 2**20
_LEAST_SQUARES, _MOST_SQUARES = 1e-24, 1e36  # between them float32 holds every square that counts


@runtime_checkable
class LayeredWeights(Protocol):
    """Weights of an adapter: they lie on those of a checkpoint, `base`."""

    @property
    def base(self) -> WeightSource: ...


def checkpoint_below(source: WeightSource) -> WeightSource:
    """The checkpoint under an adapter; a checkpoint itself."""
    return source.base if isinstance(source, LayeredWeights) else source


def same_checkpoint(x: WeightSource, y: WeightSource) -> bool:
    """Whether two sources lie on the same checkpoint directory."""
    return _resolved(checkpoint_below(x)) == _resolved(checkpoint_below(y))


def require_finite_values(values: Tensor, module: str, what: str) -> Tensor:
    """`values`, unchanged.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    # A sum is finite only where every term is, and takes a fortieth of the time; one that overflowed is looked into.
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"{what} of {module} holds NaN or infinity", "Check that the checkpoint was saved from a healthy model"
        )
    return values


class Difference:
    """x − y for one module, shape (out, in), read row block by row block.

    Args:
        x: the minuend.
        y: the subtrahend.
        module: canonical name of the module, present in both.
    """

    def __init__(self, x: WeightSource, y: WeightSource, module: str) -> None:
        self.module: LinearModule = x.modules[module]
        self._x = x
        self._y = y
        self._factors = _factors(x, y, self.module)
        self._held: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.module.out_features, self.module.in_features)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """L (out, ρ) and R (ρ, in) with x − y = L R, float32; None when the difference is dense. ρ may be 0."""
        return self._factors

    def rows(self, index: slice | Tensor) -> Tensor:
        """Rows of x − y, float32 (n, in).

        Raises:
            NonFiniteError: a value read is NaN or infinite.
        """
        if self._factors is not None:
            left, right = self._factors
            return left[index] @ right
        if self._fits_one_block:
            if self._held is None:
                self._held = self._subtract(slice(0, self.shape[0]))
            return self._held[index]
        return self._subtract(index)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, a block at a time."""
        for block in row_blocks(self.module, STREAM_BYTES):
            yield block, self.rows(block)

    def times(self, matrix: Tensor) -> Tensor:
        """(x − y) M, float32 (out, r), for a matrix M (in, r)."""
        if self._factors is not None:
            left, right = self._factors
            return left @ (right @ matrix)
        return torch.cat([rows @ matrix for _, rows in self.blocks()])

    def norm(self) -> float:
        """The Frobenius norm ‖x − y‖_F, summed in float64."""
        if self._factors is not None:
            return float(torch.linalg.norm(factored_core(*self._factors)))
        return float(sum(squared_norm(rows) for _, rows in self.blocks()) ** 0.5)

    @property
    def _fits_one_block(self) -> bool:
        return 4 * self.shape[0] * self.shape[1] <= BLOCK_BYTES

    def _subtract(self, index: slice | Tensor) -> Tensor:
        difference = self._x.rows(self.module.name, index) - self._y.rows(self.module.name, index)
        return require_finite_values(difference, self.module.name, "The weight")


def squared_norm(rows: Tensor) -> float:
    """‖rows‖_F², each row summed in float32 where that can hold the squares, and the rows in float64."""
    squares = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    if _LEAST_SQUARES < squares < _MOST_SQUARES:
        return squares
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


def factored_core(left: Tensor, right: Tensor) -> Tensor:
    """A small matrix with the singular values of L R, float64: T_L T_Rᵀ from L = Q_L T_L and Rᵀ = Q_R T_R."""
    return _triangle(left.double()) @ _triangle(right.double().T).T


def _triangle(tall: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(tall, mode="r").R
    return triangle


def _factors(x: WeightSource, y: WeightSource, module: LinearModule) -> tuple[Tensor, Tensor] | None:
    if not same_checkpoint(x, y):
        return None
    of_x, of_y = x.factors(module.name), y.factors(module.name)
    for factors in (of_x, of_y):
        if factors is not None:
            require_finite_values(factors.A, module.name, "lora_A")
            require_finite_values(factors.B, module.name, "lora_B")
    if of_x is not None and of_y is not None and torch.equal(of_x.A, of_y.A):
        # One basis: equal models then differ by exactly zero.
        return of_x.scale * of_x.B - of_y.scale * of_y.B, of_x.A
    terms = [_term(of_x, 1.0), _term(of_y, -1.0)]
    left = [term[0] for term in terms if term is not None]
    right = [term[1] for term in terms if term is not None]
    if not left:
        return torch.zeros(module.out_features, 0), torch.zeros(0, module.in_features)
    return torch.cat(left, dim=1), torch.cat(right, dim=0)


def _term(factors: LoraFactors | None, sign: float) -> tuple[Tensor, Tensor] | None:
    return None if factors is None else (sign * factors.scale * factors.B, factors.A)


def _resolved(source: WeightSource) -> Path:
    return source.path.resolve()
