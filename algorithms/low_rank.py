"""The rank reduction F̂ = V_r V_rᵀ F by which NLSR finds what of a weight the safe answers need.

For inputs X (tokens × in) of a module at response tokens of safe answers, V_r are the leading right singular vectors of
X Fᵀ, that is, the leading eigenvectors of F G Fᵀ with G = Σ x xᵀ. For F = L R of low rank they lie in the span of L:
with the thin QR L = Q T they are Q E, E the leading eigenvectors of T (R G Rᵀ) Tᵀ. So a LoRA update and each of its
factors need no more than the r × r matrix A G Aᵀ; a dense F needs G and a symmetric matrix of its smaller side. No
activation is stored, no decomposition is approximated, and directions that no answer moves are never kept.
Source: NLSR 2412.12497, step 2, after 2402.05162.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.differences import BLOCK_BYTES, require_finite_values
from algorithms.nlsr_settings import NlsrSettings
from algorithms.weights import LoraFactors, WeightSource, row_blocks

_ROUNDING = 1e-9
# Relative energy below which a direction is the rounding of float32 numbers, and nothing that an answer moved.
_NOTHING = 64 * torch.finfo(torch.float32).eps ** 2
_COLUMNS = 1024


class Matrix(Protocol):
    """A matrix of one module, (out, in), whose rows are read when asked for. `Difference` is one."""

    module: LinearModule

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """L (out, ρ) and R (ρ, in) with F = L R; None for a dense matrix."""

    def rows(self, index: slice | Tensor) -> Tensor:
        """Rows, float32 (n, in)."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, a block at a time."""


class EffectiveWeight:
    """The whole effective weight of a module as a `Matrix`; dense, whatever the model is."""

    def __init__(self, weights: WeightSource, module: str) -> None:
        self.module: LinearModule = weights.modules[module]
        self._weights = weights

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """None."""
        return None

    def rows(self, index: slice | Tensor) -> Tensor:
        """Rows, float32 (n, in)."""
        return require_finite_values(self._weights.rows(self.module.name, index), self.module.name, "The weight")

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, a block at a time."""
        for block in row_blocks(self.module, BLOCK_BYTES):
            yield block, self.rows(block)


def kept_rank(smaller_side: int, settings: NlsrSettings) -> int:
    """How many directions of a matrix are kept: ⌊r (1−P)⌋ and at least 1; by the published code's rule ⌊r P⌋."""
    sparsity = settings.sparsity if settings.rank_sparsity is None else settings.rank_sparsity
    share = 1 - sparsity if settings.rank_rule == "paper" else sparsity
    return min(smaller_side, max(1, int(smaller_side * share + _ROUNDING)))


def largest_rank(matrix: Matrix) -> int:
    """The smaller side of F, or of its factors."""
    sides = (matrix.module.out_features, matrix.module.in_features)
    factors = matrix.factors()
    return min(sides) if factors is None else min(*sides, factors[0].shape[1])


class LowRank:
    """F̂ = V Vᵀ F, of rank at most `rank`; rows are computed when asked for.

    Args:
        matrix: F.
        moment: R G Rᵀ (ρ, ρ) for a factored F = L R, else G (in, in); a positive multiple gives the same F̂.
        rank: r*, how many directions are kept. From `largest_rank(matrix)` on nothing is cut: F̂ = F exactly.
    """

    def __init__(self, matrix: Matrix, moment: Tensor, rank: int) -> None:
        self._matrix = matrix
        # F̂ = left · right, where left is F · projection for a tall dense F; both are None where F̂ = F.
        self._left: Tensor | None = None
        self._projection: Tensor | None = None
        self._right: Tensor | None = None
        if rank >= largest_rank(matrix):
            return
        factors = matrix.factors()
        if factors is not None:
            reduced = _leading_part(factors[0], moment, rank)
            self._left, self._right = reduced[0].float(), (reduced[1] @ factors[1].double()).float()
        elif matrix.module.out_features <= matrix.module.in_features:
            self._left, self._right = _reduced_wide(matrix, moment, rank)
        else:
            self._projection, self._right = _reduced_tall(matrix, moment, rank)

    def rows(self, index: slice | Tensor) -> Tensor:
        """Rows of F̂, float32 (n, in)."""
        return self._matrix.rows(index) if self._right is None else self._coordinates(index) @ self._right

    def row_norms(self) -> Tensor:
        """‖F̂_i‖₂ of every row; (out,) float32."""
        if self._right is None:
            return row_norms(self._matrix)
        core = self._right.double() @ self._right.double().T
        found = []
        for block in row_blocks(self._matrix.module, BLOCK_BYTES):
            left = self._coordinates(block).double()
            found.append(((left @ core) * left).sum(dim=1).clamp_min(0.0).sqrt().float())
        return torch.cat(found)

    def _coordinates(self, index: slice | Tensor) -> Tensor:
        if self._left is not None:
            return self._left[index]
        rows = self._matrix.rows(index)
        return rows if self._projection is None else rows @ self._projection


def row_norms(matrix: Matrix) -> Tensor:
    """‖F_i‖₂ of every row; (out,) float32."""
    return torch.cat([rows.norm(dim=1) for _, rows in matrix.blocks()])


def reduced_factors(factors: LoraFactors, moment: Tensor, settings: NlsrSettings) -> LoraFactors:
    """Â and B̂: each LoRA factor reduced as a matrix of its own, the inputs of B being A x.

    Args:
        factors: A (r, in) and B (out, r) of the reference.
        moment: A G Aᵀ, (r, r), or a positive multiple.
        settings: sparsity, rank_sparsity and rank_rule.
    """
    A, B = factors.A, factors.B
    rank_of_a, rank_of_b = kept_rank(min(A.shape), settings), kept_rank(min(B.shape), settings)
    if rank_of_a < min(A.shape):
        E = _leading_eigenvectors(moment.double(), rank_of_a)
        A = (E @ (E.T @ A.double())).float()
    if rank_of_b < min(B.shape):
        left, right = _leading_part(B, moment, rank_of_b)
        B = (left @ right).float()
    return LoraFactors(A, B, factors.scale)


def _leading_part(L: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q E and Eᵀ T of L = Q T, with E the leading eigenvectors of T · moment · Tᵀ; float64."""
    triangular = torch.linalg.qr(L.double())
    Q, T = triangular.Q, triangular.R
    E = _leading_eigenvectors(T @ moment.double() @ T.T, rank)
    return Q @ E, E.T @ T


def _reduced_wide(matrix: Matrix, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V (out, r*) and Vᵀ F (r*, in) for out ≤ in, from F G Fᵀ by pairs of row blocks."""
    outputs, inputs = matrix.module.out_features, matrix.module.in_features
    gram = torch.zeros(outputs, outputs, dtype=torch.float64)
    for above, rows in matrix.blocks():
        image = _times(rows, moment)
        for below, others in matrix.blocks():
            if below.start <= above.start:
                product = image @ others.double().T
                gram[above, below] = product
                gram[below, above] = product.T
    V = _leading_eigenvectors(gram, rank).float()
    right = torch.zeros(V.shape[1], inputs)
    for block, rows in matrix.blocks():
        right.addmm_(V[block].T, rows)
    return V, right


def _reduced_tall(matrix: Matrix, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P (in, r*) and S (r*, in) with F̂ = F P S, for out > in.

    A QR factorisation of F without its Q: Fᵀ F = Y Λ Yᵀ gives the small factor T = Λ^½ Yᵀ, and Q E = F Y Λ^-½ E.
    """
    inputs = matrix.module.in_features
    gram = torch.zeros(inputs, inputs, dtype=torch.float64)
    for _, rows in matrix.blocks():
        rows64 = rows.double()
        gram.addmm_(rows64.T, rows64)
    squares, Y = torch.linalg.eigh(gram)
    # What lies below the rounding of float32 weights is no direction of F.
    held = squares > squares[-1] * _NOTHING
    lengths, Y = squares[held].sqrt(), Y[:, held]
    T = lengths[:, None] * Y.T
    E = _leading_eigenvectors(_times(T, moment) @ T.T, rank)
    return ((Y / lengths) @ E).float(), (E.T @ T).float()


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """Orthonormal columns (n, ≤ count) that belong to the largest eigenvalues above rounding, largest first."""
    if not len(symmetric):
        return symmetric
    values, vectors = torch.linalg.eigh(symmetric)
    count = min(count, int((values > values[-1] * _NOTHING).sum()))
    leading: Tensor = vectors.flip(1)[:, :count]
    return leading


def _times(rows: Tensor, moment: Tensor) -> Tensor:
    """rows · moment in float64, without a second moment in that precision."""
    rows = rows.double()
    starts = range(0, moment.shape[1], _COLUMNS)
    return torch.cat([rows @ moment[:, start : start + _COLUMNS].double() for start in starts], dim=1)
