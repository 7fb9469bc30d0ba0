"""The operator C, and the leading directions of a Gram matrix."""

from dataclasses import dataclass
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms import differences, projection
from algorithms.differences import Difference
from algorithms.projection import SafetyProjection, largest_singular_value, leading_directions, orthogonal_to
from tests.algorithms.fakes import FullWeights, full, lora, low_rank, noise

shapes = st.tuples(st.integers(2, 14), st.integers(2, 14))
seeds = st.integers(0, 10_000)


def directions(shape: tuple[int, int], seed: int, *, factored: bool, scale: float) -> Difference:
    base = full("base", m=noise(*shape, seed=seed))
    if factored:
        factors = low_rank(*shape, 3, seed=seed, scale=scale)
        return Difference(lora("aligned", base, m=factors), base, "m")
    return Difference(full("aligned", m=base.weights["m"] + noise(*shape, seed=seed + 1, scale=scale)), base, "m")


def operator(C: SafetyProjection) -> Tensor:
    """C itself, from its action on the identity."""
    outputs = C.V.shape[0]
    return C.of(lambda index: torch.eye(outputs)[index], outputs).rows(torch.arange(outputs))


@settings(max_examples=80, deadline=None)
@given(
    shapes,
    seeds,
    st.booleans(),
    st.sampled_from(["fro", "numel", "in", "orthogonal"]),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_the_operator_is_symmetric_positive_and_never_expands(
    shape: tuple[int, int], seed: int, factored: bool, normalization: Any, scale: float
) -> None:
    V = directions(shape, seed, factored=factored, scale=scale)
    C = operator(SafetyProjection(V, normalization, 0.8)).double()
    largest = float(C.abs().max())
    assert float((C - C.T).abs().max()) <= 1e-5 * largest
    eigenvalues = torch.linalg.eigvalsh((C + C.T) / 2)
    assert float(eigenvalues[0]) >= -1e-5 * largest
    assert float(eigenvalues[-1]) <= 1 + 1e-5


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.booleans(), st.floats(0.05, 1.0))
def test_the_orthogonal_operator_is_idempotent_and_holds_its_energy(
    shape: tuple[int, int], seed: int, factored: bool, energy: float
) -> None:
    V = directions(shape, seed, factored=factored, scale=1.0)
    C = operator(SafetyProjection(V, "orthogonal", energy)).double()
    assert float((C @ C - C).abs().max()) < 1e-5
    dense = V.rows(slice(0, shape[0])).double()
    held = (C @ dense).square().sum() / dense.square().sum()
    assert float(held) >= energy - 1e-5


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, st.booleans())
def test_the_largest_singular_value_is_the_one_of_a_full_decomposition(
    shape: tuple[int, int], seed: int, factored: bool
) -> None:
    V = directions(shape, seed, factored=factored, scale=1.0)
    exact = float(torch.linalg.svdvals(V.rows(slice(0, shape[0])).double())[0])
    assert largest_singular_value(V) == pytest.approx(exact, rel=1e-5)


def test_the_largest_singular_value_of_a_large_flat_spectrum_is_found() -> None:
    V = directions((300, 200), 5, factored=False, scale=1.0)
    exact = float(torch.linalg.svdvals(V.rows(slice(0, 300)).double())[0])
    assert largest_singular_value(V) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("scale", "clamps"), [(0.05, False), (0.4, True), (3.0, True)])
def test_a_large_operator_is_clamped_only_where_it_would_expand(scale: float, clamps: bool) -> None:
    V = directions((400, 300), 2, factored=False, scale=scale)
    dense = V.rows(slice(0, 400)).double()
    largest = float(torch.linalg.svdvals(dense)[0]) ** 2
    found = SafetyProjection(V, "fro").scale
    assert (largest > float(dense.norm())) == clamps
    assert found == pytest.approx(1 / max(largest, float(dense.norm())), rel=2e-5)
    assert found * largest <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.sampled_from([1e-12, 0.01, 1.0, 30.0, 1e12]), st.floats(0.0, 3.0))
def test_the_quick_bound_is_never_below_the_largest_eigenvalue(
    shape: tuple[int, int], seed: int, scale: float, decay: float
) -> None:
    spectrum = torch.arange(1.0, 1 + shape[1]) ** -decay
    V = Difference(
        full("aligned", m=scale * noise(*shape, seed=seed) * spectrum), full("base", m=torch.zeros(shape)), "m"
    )
    dense = V.rows(slice(0, shape[0])).double()
    largest = float(torch.linalg.svdvals(dense)[0]) ** 2
    bound = projection._LargestEigenvalueBound(V)
    bound.tighten()
    assert bound.norm == pytest.approx(float(dense.norm()))
    for _ in range(projection._POWERS):
        assert bound.value >= largest
        bound.tighten()


def test_the_quick_bound_settles_a_flat_spectrum_in_the_pass_that_finds_the_norm() -> None:
    V = directions((400, 300), 2, factored=False, scale=0.01)
    bound = projection._LargestEigenvalueBound(V)
    bound.tighten()
    dense = V.rows(slice(0, 400)).double()
    largest = float(torch.linalg.svdvals(dense)[0]) ** 2
    assert largest <= bound.value < bound.norm < bound.norm**2
    while bound.power < projection._POWERS:
        looser = bound.value
        bound.tighten()
        assert bound.value < looser
    assert bound.value < 4 * largest


def test_the_quick_bound_of_nothing_is_zero() -> None:
    bound = projection._LargestEigenvalueBound(
        Difference(full("x", m=torch.zeros(3, 4)), full("y", m=torch.zeros(3, 4)), "m")
    )
    for _ in range(2):
        bound.tighten()
    assert (bound.norm, bound.value) == (0.0, 0.0)


@dataclass
class CountedWeights(FullWeights):
    """Counts how many rows are read."""

    rows_read: int = 0

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        found = super().rows(module, index)
        self.rows_read += len(found)
        return found


def test_projecting_some_rows_reads_each_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that multiplies finds norm and bound too; the selected rows themselves are read beside."""
    for part in (differences, projection):
        monkeypatch.setattr(part, "STREAM_BYTES", 4 * 300 * 32)
    monkeypatch.setattr(differences, "BLOCK_BYTES", 0)
    base = CountedWeights(Path("/models/base"), {"m": noise(400, 300, seed=1)})
    aligned = CountedWeights(Path("/models/aligned"), {"m": base.weights["m"] + noise(400, 300, seed=2, scale=0.01)})
    update = noise(400, 300, seed=3)
    wanted = torch.arange(0, 400, 20)
    C = SafetyProjection(Difference(aligned, base, "m"), "fro")
    found = C.of(lambda index: update[index], 300).rows(wanted)
    V = (aligned.weights["m"] - base.weights["m"]).double()
    torch.testing.assert_close(found.double(), (V[wanted] @ V.T @ update.double()) / V.norm(), atol=1e-5, rtol=1e-5)
    assert aligned.rows_read == base.rows_read == 400 + len(wanted)


def test_the_thread_that_multiplies_takes_as_many_cores_as_the_caller_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that is new MKL takes every core, and does not tell."""
    told: dict[str, int] = {}
    ours = current_thread().name
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: told.update({current_thread().name: threads}))
    C = SafetyProjection(directions((30, 8), 4, factored=False, scale=1.0), "fro")
    C.of(lambda index: torch.eye(30)[index], 30).rows(torch.tensor([0, 3]))
    assert list(told.values()) == [7]
    assert ours not in told


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
@pytest.mark.parametrize("normalization", ["fro", "numel", "in", "orthogonal"])
@pytest.mark.parametrize("columns", [2, 30])
def test_streaming_by_blocks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], normalization: Any, columns: int
) -> None:
    M = noise(shape[0], columns, seed=9)
    wanted = torch.tensor([0, 3, 7])

    def rows() -> Tensor:
        C = SafetyProjection(directions(shape, 4, factored=False, scale=1.0), normalization)
        return C.of(lambda index: M[index], columns).rows(wanted)

    whole = rows()
    monkeypatch.setattr(differences, "BLOCK_BYTES", 0)
    for part in (differences, projection):
        monkeypatch.setattr(part, "STREAM_BYTES", 4 * shape[1] * 3)
    torch.testing.assert_close(rows(), whole, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 30), seeds, st.integers(1, 8))
def test_leading_directions_are_orthonormal_and_capture_the_most(k: int, tokens: int, seed: int, count: int) -> None:
    x = noise(tokens, k, seed=seed)
    G = x.T @ x
    Q = leading_directions(G, count)
    assert Q.shape == (k, min(count, k, tokens))
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1]), atol=1e-5, rtol=0)
    most = torch.linalg.eigvalsh(G.double()).flip(0)[: Q.shape[1]].sum()
    assert float(torch.trace(Q.T @ G @ Q)) == pytest.approx(float(most), rel=1e-4)


def test_subspace_iteration_agrees_with_exact_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = torch.logspace(0, -3, 120)
    x = noise(500, 120, seed=1) * spread
    G = x.T @ x / 500
    exact = leading_directions(G, 8)
    monkeypatch.setattr(projection, "_EXACT_EIGENVECTORS", 10)
    iterated = leading_directions(G, 8)
    cosines = torch.linalg.svdvals(exact.T @ iterated)
    assert float(cosines.min()) > 1 - 1e-5


def test_a_zero_gram_matrix_has_no_directions() -> None:
    assert leading_directions(torch.zeros(5, 5), 3).shape == (5, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), seeds, st.integers(0, 6), st.integers(1, 6))
def test_new_directions_avoid_claimed_ones_and_span_the_rest(k: int, seed: int, claims: int, count: int) -> None:
    claimed = noise(k, claims, seed=seed)
    Q = torch.linalg.qr(noise(k, min(count, k), seed=seed + 1)).Q
    found = orthogonal_to(Q, claimed)
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1]), atol=1e-5, rtol=0)
    assert float((claimed.T @ found).abs().max() if found.numel() and claims else 0.0) < 1e-4
    both = torch.cat([claimed, Q], dim=1).double()
    assert int(torch.linalg.matrix_rank(torch.cat([claimed, found], dim=1).double(), rtol=1e-6)) == int(
        torch.linalg.matrix_rank(both, rtol=1e-6)
    )


def test_a_direction_that_is_claimed_already_is_dropped() -> None:
    Q = torch.eye(5)[:, :3]
    found = orthogonal_to(Q, Q[:, 1:2] * -4.0)
    assert found.shape == (5, 2)
    assert torch.equal(orthogonal_to(Q, torch.zeros(5, 0)), Q)
