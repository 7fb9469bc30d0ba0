"""The rank reduction equals the singular value decomposition that defines it, whatever shape F has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithms import low_rank as low_rank_module
from algorithms.differences import Difference
from algorithms.low_rank import EffectiveWeight, LowRank, kept_rank, largest_rank, reduced_factors, row_norms
from algorithms.nlsr_settings import NlsrSettings
from algorithms.weights import LoraFactors
from tests.algorithms.fakes import full, lora, low_rank, noise

seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(2, 12), st.integers(2, 12))
sparsities = st.floats(0, 0.95)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows even in tiny matrices."""
    monkeypatch.setattr(low_rank_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr("algorithms.differences.BLOCK_BYTES", 100)


def by_definition(x: Tensor, F: Tensor, rank: int) -> Tensor:
    """V_r V_rᵀ F with V_r the leading right singular vectors of X Fᵀ, of those that are not zero; float64."""
    decomposition = torch.linalg.svd(x.double() @ F.double().T, full_matrices=False)
    moved = int((decomposition.S / decomposition.S[0] > 1e-5).sum())
    V = decomposition.Vh[: min(rank, moved)].T
    return V @ V.T @ F.double()


def reduced_by_definition(x: Tensor, F: Tensor, chosen: NlsrSettings) -> Tensor:
    rank = kept_rank(min(F.shape), chosen)
    return F.double() if rank == min(F.shape) else by_definition(x, F, rank)


def inputs_for(width: int, seed: int) -> Tensor:
    """Well-spread inputs, so that the leading directions are well defined."""
    return noise(4 * width, width, seed=seed) * torch.linspace(0.3, 3.0, width)


@given(shapes, seeds, st.integers(1, 6))
def test_a_dense_matrix_is_reduced_as_the_definition_says(shape: tuple[int, int], seed: int, rank: int) -> None:
    F, x = noise(*shape, seed=seed), inputs_for(shape[1], seed + 1)
    rank = min(rank, *shape)
    found = LowRank(EffectiveWeight(full("w", m=F), "m"), x.T.double() @ x.double(), rank)
    expected = by_definition(x, F, rank)
    scale = float(F.norm())
    assert float((found.rows(slice(0, shape[0])).double() - expected).norm()) < 2e-3 * scale
    assert float((found.row_norms().double() - expected.norm(dim=1)).norm()) < 2e-3 * scale
    picked = torch.tensor([shape[0] - 1, 0])
    torch.testing.assert_close(found.rows(picked), found.rows(slice(0, shape[0]))[picked])


@given(shapes, seeds, st.integers(1, 4), st.integers(1, 4))
def test_a_lora_update_needs_only_the_inputs_of_its_b(shape: tuple[int, int], seed: int, inner: int, rank: int) -> None:
    base = full("b", m=noise(*shape, seed=seed))
    factors = low_rank(*shape, inner, seed=seed + 1)
    update = Difference(lora("a", base, m=factors), base, "m")
    x = inputs_for(shape[1], seed + 2)
    ax = x.double() @ factors.A.double().T
    rank = min(rank, largest_rank(update))
    found = LowRank(update, ax.T @ ax, rank)
    expected = by_definition(x, factors.scale * factors.B.double() @ factors.A.double(), rank)
    scale = 1 + float(expected.norm())
    assert float((found.rows(slice(0, shape[0])).double() - expected).norm()) < 2e-3 * scale
    assert float((found.row_norms().double() - expected.norm(dim=1)).norm()) < 2e-3 * scale


@given(shapes, seeds, st.integers(1, 4), sparsities)
def test_each_factor_is_reduced_as_the_definition_says(
    shape: tuple[int, int], seed: int, inner: int, sparsity: float
) -> None:
    factors, x = low_rank(*shape, inner, seed=seed), inputs_for(shape[1], seed + 2)
    ax = x.double() @ factors.A.double().T
    chosen = NlsrSettings(sparsity=sparsity)
    found = reduced_factors(factors, (ax.T @ ax) / len(x), chosen)
    A = reduced_by_definition(x, factors.A, chosen)
    B = reduced_by_definition(ax, factors.B, chosen)
    assert float((found.A.double() - A).norm()) < 2e-3 * (1 + float(A.norm()))
    assert float((found.B.double() - B).norm()) < 2e-3 * (1 + float(B.norm()))
    assert found.scale == factors.scale


@given(shapes, seeds, sparsities)
def test_the_rank_is_at_most_the_kept_one(shape: tuple[int, int], seed: int, sparsity: float) -> None:
    F, x = noise(*shape, seed=seed), inputs_for(shape[1], seed + 1)
    matrix = EffectiveWeight(full("w", m=F), "m")
    rank = kept_rank(largest_rank(matrix), NlsrSettings(sparsity=sparsity))
    rows = LowRank(matrix, x.T @ x, rank).rows(slice(0, shape[0])).double()
    values = torch.linalg.svdvals(rows)
    assert int((values > 1e-4 * values[0]).sum()) <= rank
    assert rank == max(1, int(min(shape) * (1 - sparsity) + 1e-9))


@given(shapes, seeds, st.integers(1, 4))
def test_nothing_is_cut_at_sparsity_zero(shape: tuple[int, int], seed: int, inner: int) -> None:
    whole = NlsrSettings(sparsity=0)
    F, x = noise(*shape, seed=seed), inputs_for(shape[1], seed + 1)
    matrix = EffectiveWeight(full("w", m=F), "m")
    found = LowRank(matrix, x.T @ x, kept_rank(largest_rank(matrix), whole))
    assert torch.equal(found.rows(slice(0, shape[0])), F)
    torch.testing.assert_close(found.row_norms(), F.norm(dim=1))
    factors = low_rank(*shape, inner, seed=seed)
    reduced = reduced_factors(factors, torch.eye(inner), whole)
    for found_factor, factor in ((reduced.A, factors.A), (reduced.B, factors.B)):
        torch.testing.assert_close(found_factor, factor, atol=1e-5, rtol=1e-5)


@given(seeds)
def test_fewer_tokens_than_inputs_leave_a_reduction_of_lower_rank(seed: int) -> None:
    for shape in ((9, 6), (6, 9)):
        F, x = noise(*shape, seed=seed), noise(2, shape[1], seed=seed + 1)
        found = LowRank(EffectiveWeight(full("w", m=F), "m"), x.T.double() @ x.double(), 4)
        expected = by_definition(x, F, 2)
        assert float((found.rows(slice(0, shape[0])).double() - expected).norm()) < 2e-3 * float(F.norm())


def test_a_matrix_of_lower_rank_than_its_shape_is_reduced_without_division_by_zero() -> None:
    F = noise(9, 2, seed=0) @ noise(2, 5, seed=1)
    x = inputs_for(5, 2)
    for rank in (1, 2, 4):
        rows = LowRank(EffectiveWeight(full("w", m=F), "m"), x.T.double() @ x.double(), rank).rows(slice(0, 9))
        expected = by_definition(x, F, rank)
        assert float((rows.double() - expected).norm()) < 2e-3 * float(F.norm())
    zero = LowRank(EffectiveWeight(full("w", m=torch.zeros(9, 5)), "m"), x.T @ x, 2)
    assert torch.equal(zero.row_norms(), torch.zeros(9))


@pytest.mark.parametrize(
    ("side", "overrides", "rank"),
    [
        (16, {}, 3),
        (5, {}, 1),
        (4, {}, 1),
        (4096, {}, 819),
        (16, {"rank_rule": "published-code"}, 12),
        (4, {"rank_sparsity": 0.5}, 2),
        (4, {"rank_sparsity": 0}, 4),
        (0, {}, 0),
    ],
)
def test_the_kept_rank_follows_the_rule(side: int, overrides: dict[str, object], rank: int) -> None:
    assert kept_rank(side, NlsrSettings.model_validate(overrides)) == rank


def test_row_norms_of_an_update_are_those_of_the_dense_product() -> None:
    base = full("b", m=noise(6, 5, seed=0))
    factors = LoraFactors(noise(2, 5, seed=1), noise(6, 2, seed=2), 0.5)
    norms = row_norms(Difference(lora("a", base, m=factors), base, "m"))
    torch.testing.assert_close(norms, (0.5 * factors.B @ factors.A).norm(dim=1))
