"""The operator C = V Vᵀ / N on the output side of a module, V = W_a − W_0, without ever forming it.

V's columns span the directions in output space that alignment moved; C M keeps of M's columns what lies along them.
N is a recorded choice (`Normalization`); whatever it is, C is scaled down when its largest eigenvalue exceeds 1, so
that the operator never expands. Sources: SafeLoRA 2405.16833 (N = ‖V‖_F), FGSN 2508.09190 (N undefined there).
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from algorithms.differences import STREAM_BYTES, Difference, factored_core, squared_norm
from algorithms.parallel import trailing
from algorithms.settings import Normalization
from algorithms.weights import row_blocks

RowReader = Callable[[slice | Tensor], Tensor]

_LANCZOS_STEPS = 60
_LANCZOS_TOLERANCE = 1e-8
_RANDOM_VECTORS = 16
_POWERS = 4
_CHANCE = 1e-9
# Lanczos approaches the largest eigenvalue from below, and multiplies in float32.
_CLAMP_MARGIN = 1.0 + 1e-5


class SafetyProjection:
    """C = V Vᵀ / N for one module; symmetric, positive semidefinite, and λ_max(C) ≤ 1 when clamped.

    Args:
        V: safety directions, (out, in).
        normalization: what N is. `orthogonal` makes C the projector on the leading left singular vectors of V.
        energy: share of ‖V‖_F² that those singular vectors hold (`orthogonal` only).
        clamp: scale C by min(1, 1/λ_max). SafeLoRA as published does not.
    """

    def __init__(self, V: Difference, normalization: Normalization, energy: float = 0.9, *, clamp: bool = True) -> None:
        self.V = V
        self.basis: Tensor | None = None
        self._normalization = normalization
        self._bound = _LargestEigenvalueBound(V) if clamp else None
        if normalization == "orthogonal":
            self.basis = _left_singular_vectors(V, energy) if V.norm() else torch.zeros(V.shape[0], 0)

    @cached_property
    def scale(self) -> float:
        """1/N after clamping; 0 where V = 0, so that C = 0. Costs passes over V that `blocks` has not made."""
        if self.basis is not None:
            return 1.0 if self.basis.shape[1] else 0.0
        norm = self._norm()
        if norm == 0.0:
            return 0.0
        outputs, inputs = self.V.shape
        divisor = {"fro": norm, "numel": float(outputs * inputs), "in": float(inputs)}[self._normalization]
        # λ_max(C) = σ_max(V)²/N ≤ ‖V‖_F²/N: the cheap bound often settles it.
        if self._bound is not None and norm**2 > divisor:
            divisor = _clamped(self.V, divisor, self._bound)
        return 1.0 / divisor

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows of V in order, a block at a time; in the first pass `scale` learns what it needs on the way."""
        if self._bound is None or self._bound.power or self.basis is not None:
            return self.V.blocks()
        return self._bound.learning()

    def _norm(self) -> float:
        if self._bound is None or self.V.factors() is not None:
            return self.V.norm()
        if not self._bound.power:
            self._bound.tighten()
        return self._bound.norm

    @property
    def is_zero(self) -> bool:
        """Whether C = 0, because the aligned model equals the base in this module."""
        return self.scale == 0.0

    def of(self, matrix: RowReader, columns: int) -> "ProjectedMatrix":
        """C M for a matrix M of which rows can be read.

        Args:
            matrix: gives rows of M, float32 (n, columns); M has as many rows as V.
            columns: number of columns of M.
        """
        return ProjectedMatrix(self, matrix, columns)


class ProjectedMatrix:
    """Rows of C M, each computed when asked for: (C M)_i = V_i (Vᵀ M) / N.

    Depending on the shapes, either the small matrix that V_i is multiplied with is kept, or V and M are streamed for
    every block of rows; no (out, out) or (in, in) matrix is formed.
    """

    def __init__(self, projection: SafetyProjection, matrix: RowReader, columns: int) -> None:
        self._projection = projection
        self._matrix = matrix
        self._columns = columns
        self._right: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        """Rows of C M, float32 (n, columns)."""
        C = self._projection
        if C.basis is None and C.V.factors() is None and 2 * self._columns > min(C.V.shape):
            return self._streamed(index)
        if C.is_zero:
            return torch.zeros(len(index), self._columns)
        if self._right is None:
            self._right = self._right_factor()
        return self._left(index) @ self._right

    def _left(self, index: slice | Tensor) -> Tensor:
        C = self._projection
        if C.basis is not None:
            return C.basis[index]
        factors = C.V.factors()
        return C.V.rows(index) if factors is None else factors[0][index]

    def _right_factor(self) -> Tensor:
        """The matrix S with C M = left · S: U_cᵀ M, or (R Rᵀ)(Lᵀ M)/N for V = L R, or Vᵀ M/N."""
        C = self._projection
        total: Tensor | None = None
        for block in self._blocks():
            part = self._left(block).T @ self._matrix(block)
            total = part if total is None else total.add_(part)
        if total is None:
            return torch.zeros(0, self._columns)
        factors = C.V.factors()
        if C.basis is None and factors is not None:
            total = (factors[1] @ factors[1].T) @ total
        return total * C.scale

    def _streamed(self, index: Tensor) -> Tensor:
        C = self._projection
        rows = C.V.rows(index)
        total = torch.zeros(len(index), self._columns)
        if not bool(rows.any()):
            return total
        threads = torch.get_num_threads()

        def multiply(blocks: tuple[Tensor, Tensor]) -> None:
            of_V, of_M = blocks
            torch.set_num_threads(threads)  # or the product would take every core in a thread that is new
            total.addmm_(rows @ of_V.T, of_M)

        for _ in trailing(multiply, ((of_V, self._matrix(block)) for block, of_V in C.blocks())):
            pass
        return total.mul_(C.scale)

    def _blocks(self) -> Iterator[slice]:
        return row_blocks(self._projection.V.module, STREAM_BYTES)


def largest_singular_value(V: Difference) -> float:
    """σ_max(V): exact for a factored V, else by Lanczos on VᵀV with full reorthogonalisation (one pass per step)."""
    factors = V.factors()
    if factors is not None:
        return float(torch.linalg.matrix_norm(factored_core(*factors), ord=2)) if factors[0].shape[1] else 0.0
    return float(max(_ritz_values(V), default=0.0) ** 0.5)


def _clamped(V: Difference, divisor: float, bound: "_LargestEigenvalueBound") -> float:
    """max(divisor, σ_max²), without finding σ_max where it plainly stays below."""
    if V.factors() is not None:
        return max(divisor, largest_singular_value(V) ** 2)
    while bound.value >= divisor and bound.power < _POWERS:
        bound.tighten()
    if bound.value < divisor:
        return divisor
    return max(divisor, largest_singular_value(V) ** 2 * _CLAMP_MARGIN)


class _LargestEigenvalueBound:
    """An upper bound of λ = λ_max(VᵀV) from (VᵀV)^q Ω, one pass over V for each q; too low with a chance of 1e-9.

    A column ω of Ω is normal, so ‖(VᵀV)^q ω‖ ≥ λ^q |vᵀω| for the leading eigenvector v, and vᵀω is normal too:
    |vᵀω| < τ with a chance of at most τ √(2/π), all b columns together with the b-th power of that. τ is where
    this is 1e-9, and λ ≤ (max_ω ‖(VᵀV)^q ω‖ / τ)^(1/q). (The argument is that of Dixon 1983, SIAM J. Numer. Anal. 20.)

    Attributes:
        norm: ‖V‖_F; known after the first pass, as the bound is.
        power: q, the number of passes.
        value: the bound.
    """

    def __init__(self, V: Difference) -> None:
        self._V = V
        self._vectors: Tensor | None = None
        self._log_scale = 0.0
        self.power = 0
        self.norm = math.nan
        self.value = math.inf

    def tighten(self) -> None:
        """Raise q by one, which costs one pass over V."""
        for _ in self.learning():
            pass

    def learning(self) -> Iterator[tuple[slice, Tensor]]:
        """One pass over V, whose blocks are given on; q is raised at its end."""
        vectors = self._vectors
        if vectors is None:
            vectors = torch.randn(self._V.shape[1], _RANDOM_VECTORS, generator=torch.Generator().manual_seed(0))
        image = torch.zeros(vectors.shape[::-1])  # transposed, which is twice as fast
        squares = 0.0
        for block, rows in self._V.blocks():
            squares += squared_norm(rows)
            image.addmm_((rows @ vectors).T, rows)
            yield block, rows
        self.norm = squares**0.5
        self.power += 1
        length = float(torch.linalg.vector_norm(image, dim=1, dtype=torch.float64).max())
        if length > 0.0:
            self._vectors = image.T / length
            self._log_scale += math.log(length)
        # The margin is for products in float32.
        smallest = _CHANCE ** (1 / _RANDOM_VECTORS) * math.sqrt(math.pi / 2)
        self.value = 1.001 * math.exp((self._log_scale - math.log(smallest)) / self.power) if length > 0.0 else 0.0


def _ritz_values(V: Difference) -> Iterator[float]:
    """Ever better estimates, from below, of the largest eigenvalue of VᵀV, until they settle."""
    generator = torch.Generator().manual_seed(0)
    vectors = [_unit(torch.randn(V.shape[1], dtype=torch.float64, generator=generator))]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    estimate = 0.0
    for _ in range(min(_LANCZOS_STEPS, V.shape[1])):
        image = torch.zeros(V.shape[1], dtype=torch.float64)
        vector = vectors[-1].float()
        for _block, rows in V.blocks():
            image += rows.T @ (rows @ vector)
        diagonal.append(float(image @ vectors[-1]))
        basis = torch.stack(vectors)
        for _repeat in range(2):
            image = image - basis.T @ (basis @ image)
        previous, estimate = estimate, _largest_ritz_value(diagonal, off_diagonal)
        yield estimate
        remainder = float(image.norm())
        if remainder <= 1e-7 * estimate or abs(estimate - previous) <= _LANCZOS_TOLERANCE * estimate:
            return
        off_diagonal.append(remainder)
        vectors.append(image / remainder)


def _largest_ritz_value(diagonal: list[float], off_diagonal: list[float]) -> float:
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        beside = torch.tensor(off_diagonal, dtype=torch.float64)
        tridiagonal = tridiagonal + torch.diag(beside, 1) + torch.diag(beside, -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def _left_singular_vectors(V: Difference, energy: float) -> Tensor:
    """Orthonormal U_c (out, c): the fewest leading left singular vectors of V with `energy` of ‖V‖_F²; float32.

    A dense V costs one Gram matrix of its smaller side (float64) and its eigenvectors.
    """
    factors = V.factors()
    if factors is not None:
        left = torch.linalg.qr(factors[0].double())
        U, S, _ = torch.linalg.svd(left.R @ factors[1].double(), full_matrices=False)
        leading: Tensor = left.Q @ U[:, : _leading(S.square(), energy)]
        return leading.float()
    outputs, inputs = V.shape
    if outputs <= inputs:
        squares, vectors = _descending(*torch.linalg.eigh(_row_gram(V)))
        return vectors[:, : _leading(squares, energy)].float()
    gram = torch.zeros(inputs, inputs, dtype=torch.float64)
    for _, rows in V.blocks():
        rows64 = rows.double()
        gram.addmm_(rows64.T, rows64)
    squares, vectors = _descending(*torch.linalg.eigh(gram))
    right = vectors[:, : _leading(squares, energy)]
    images = torch.cat([rows.double() @ right for _, rows in V.blocks()])
    orthonormal: Tensor = torch.linalg.qr(images).Q
    return orthonormal.float()


def _row_gram(V: Difference) -> Tensor:
    gram = torch.zeros(V.shape[0], V.shape[0], dtype=torch.float64)
    for above, rows in V.blocks():
        for below, others in V.blocks():
            if below.start <= above.start:
                product = rows.double() @ others.double().T
                gram[above, below] = product
                gram[below, above] = product.T
    return gram


def _descending(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return values.flip(0).clamp_min(0.0), vectors.flip(1)


def _leading(squares: Tensor, energy: float) -> int:
    """How many of the descending squared singular values hold the share; those lost in rounding never count."""
    rounding = squares[0] * len(squares) * torch.finfo(torch.float32).eps ** 2
    usable = int((squares > rounding).sum())
    shares = squares.cumsum(0) / squares.sum()
    return min(usable, int((shares < energy - 1e-12).sum()) + 1)


def leading_directions(second_moment: Tensor, count: int) -> Tensor:
    """The leading eigenvectors of a Gram matrix, with signs fixed so that the same matrix gives the same vectors.

    Args:
        second_moment: symmetric positive semidefinite (in, in).
        count: how many; fewer are returned where the matrix has a lower rank.

    Returns:
        Q, float32 (in, r), orthonormal columns, largest eigenvalue first. Exact for small matrices; above 2,048
        columns by subspace iteration from a fixed start.
    """
    if second_moment.shape[0] <= _EXACT_EIGENVECTORS:
        values, vectors = torch.linalg.eigh(second_moment.double())
        values, vectors = _descending(values, vectors)
    else:
        values, vectors = _subspace_iteration(second_moment, count)
    usable = int((values > values[0] * second_moment.shape[0] * torch.finfo(torch.float32).eps).sum())
    vectors = vectors[:, : min(count, usable)]
    largest = vectors.abs().argmax(dim=0)
    signs = torch.sign(vectors[largest, torch.arange(vectors.shape[1])])
    return (vectors * signs).float().contiguous()


def orthogonal_to(Q: Tensor, claimed: Tensor) -> Tensor:
    """The part of the span of Q that is orthogonal to claimed directions, so that removing it leaves those as they are.

    Args:
        Q: (in, r) float32 with orthonormal columns.
        claimed: (in, m) float32, the directions that applied patches protect, in any basis.

    Returns:
        Float32 (in, r') with orthonormal columns, r' ≤ r: directions of Q that lie among the claimed ones are dropped.
    """
    if claimed.shape[1] == 0:
        return Q
    P, shares, _ = torch.linalg.svd(claimed.double(), full_matrices=False)
    P = P[:, shares > shares[0] * _SAME_DIRECTION]
    rest = Q.double()
    for _ in range(2):  # once more, since the first subtraction leaves a rounding error along P
        rest = rest - P @ (P.T @ rest)
    basis, lengths, _ = torch.linalg.svd(rest, full_matrices=False)
    kept: Tensor = basis[:, lengths > _SAME_DIRECTION]
    return kept.float().contiguous()


def leading_directions_beside(second_moment: Tensor, count: int, claimed: Tensor | None) -> Tensor:
    """The leading eigenvectors of (I − PPᵀ) G (I − PPᵀ), P an orthonormal basis of claimed directions.

    Args:
        second_moment: G, symmetric positive semidefinite (in, in).
        count: how many; fewer are returned where fewer directions that inputs use are left.
        claimed: (in, m) the claimed directions in any basis; None for none, which gives `leading_directions`.

    Returns:
        Q, float32 (in, r), orthonormal columns, orthogonal to the claimed ones, largest eigenvalue first.
    """
    if claimed is None or claimed.shape[1] == 0:
        return leading_directions(second_moment, count)
    G, P = second_moment.double(), orthonormal(claimed).double()
    rest = G - P @ (P.T @ G)
    rest = rest - (rest @ P) @ P.T
    if not bool(rest.any()):
        return claimed.new_zeros(claimed.shape[0], 0, dtype=torch.float32)
    Q = orthogonal_to(leading_directions((rest + rest.T) / 2, count), claimed)
    # What is left once all that inputs use is claimed is rounding, in which there are leading directions too.
    energy = ((G @ Q.double()) * Q).sum(dim=0)
    return Q[:, energy > G.trace() * torch.finfo(torch.float32).eps].contiguous()


def orthonormal(directions: Tensor) -> Tensor:
    """An orthonormal basis, float32 (in, m'), of the span of the columns of (in, m); m' ≤ m."""
    basis, shares, _ = torch.linalg.svd(directions.double(), full_matrices=False)
    kept: Tensor = basis[:, shares > shares[:1] * _SAME_DIRECTION]
    return kept.float().contiguous()


_SAME_DIRECTION = 1e-4
_EXACT_EIGENVECTORS = 2048
_SUBSPACE_STEPS = 60


def _subspace_iteration(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    width = min(matrix.shape[0], 2 * count + 16)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(matrix.shape[0], width, generator=generator).to(matrix)).Q
    trace = 0.0
    for _ in range(_SUBSPACE_STEPS):
        vectors, triangle = torch.linalg.qr(matrix @ vectors)
        before, trace = trace, float(triangle.diagonal()[:count].abs().sum())
        if abs(trace - before) <= 1e-7 * trace:
            break
    small_values, small = torch.linalg.eigh((vectors.T @ (matrix @ vectors)).double())
    small_values, small = _descending(small_values, small)
    return small_values, vectors.double() @ small


def _unit(vector: Tensor) -> Tensor:
    return vector / float(vector.norm())
