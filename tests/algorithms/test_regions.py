"""A region holds the share that sparsity leaves, the largest of what it is ranked by, and ties do not change that."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.differences import Difference
from algorithms.errors import CalibrationError
from algorithms.low_rank import EffectiveWeight
from algorithms.nlsr_settings import NlsrSettings
from algorithms.regions import RegionStatistics, entry_mask, factor_masks, neuron_scores, region_rows
from tests.algorithms.fakes import full, lora, low_rank, noise

seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))
sparsities = st.floats(0, 0.99)
levels = st.sampled_from([0, 1, 3, 1000])
"""How many different values the scores take: few make many ties."""


def scores_with_ties(shape: tuple[int, ...], seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count + 1, shape, generator=generator).float()


@given(shapes, seeds, sparsities, levels)
def test_a_region_of_entries_has_the_share_that_is_left_within_one_entry(
    shape: tuple[int, int], seed: int, sparsity: float, count: int
) -> None:
    scores = scores_with_ties(shape, seed, count)
    whole = entry_mask(scores, NlsrSettings(sparsity=sparsity, region_scope="matrix"))
    assert abs(int(whole.sum()) - (1 - sparsity) * scores.numel()) <= 1
    by_row = entry_mask(scores, NlsrSettings(sparsity=sparsity, region_scope="row"))
    assert bool(((by_row.sum(dim=1) - (1 - sparsity) * shape[1]).abs() <= 1).all())
    for mask, lines in ((whole.reshape(1, -1), scores.reshape(1, -1)), (by_row, scores)):
        for inside, values in zip(mask, lines, strict=True):
            if bool((~inside).any()):
                assert float(values[inside].min()) >= float(values[~inside].max())


@given(st.integers(1, 60), seeds, sparsities, levels)
def test_a_region_of_neurons_has_the_share_that_is_left_within_one_neuron(
    size: int, seed: int, sparsity: float, count: int
) -> None:
    scores = scores_with_ties((size,), seed, count)
    rows = region_rows(scores, sparsity)
    assert abs(len(rows) - (1 - sparsity) * size) <= 1
    assert torch.equal(rows, rows.unique())
    outside = torch.ones(size, dtype=torch.bool)
    outside[rows] = False
    if bool(outside.any()):
        assert float(scores[rows].min()) >= float(scores[outside].max())


def test_nothing_is_outside_at_sparsity_zero() -> None:
    assert bool(entry_mask(noise(4, 5, seed=0), NlsrSettings(sparsity=0)).all())
    assert region_rows(noise(7, seed=0), 0.0).tolist() == list(range(7))


def test_ties_fall_to_the_lower_row() -> None:
    assert region_rows(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 0.6).tolist() == [1, 2]


def test_the_published_code_leaves_ties_with_the_quantile_out() -> None:
    chosen = NlsrSettings(mode="published-code", sparsity=0.5)
    assert entry_mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), chosen).tolist() == [[False, False, False, True]]
    assert not bool(entry_mask(torch.ones(3, 4), chosen).any())
    by_row = NlsrSettings(mode="published-code", sparsity=0.5, region_scope="row")
    assert entry_mask(torch.tensor([[1.0, 2.0], [9.0, 8.0], [0.0, 7.0]]), by_row).sum() == 0


@given(seeds)
def test_neurons_are_ranked_alike_for_an_adapter_and_for_its_merged_model(seed: int) -> None:
    base = full("b", m=noise(9, 6, seed=seed))
    factors = low_rank(9, 6, 3, seed=seed + 1)
    adapter = lora("a", base, m=factors)
    merged = full("merged", m=adapter.rows("m", slice(0, 9)))
    x = noise(40, 6, seed=seed + 3)
    ax = x @ factors.A.T
    # One rank for both: the smaller side is 3 of the factors and 6 of the merged update.
    of_adapter = neuron_scores(
        Difference(adapter, base, "m"), RegionStatistics(ax.T @ ax), NlsrSettings(rank_sparsity=0.3)
    )
    of_merged = neuron_scores(
        Difference(merged, base, "m"), RegionStatistics(x.T @ x), NlsrSettings(rank_sparsity=0.66)
    )
    torch.testing.assert_close(of_adapter, of_merged, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "random"])
def test_the_controls_rank_by_what_they_say(score: Any) -> None:
    W, norms = noise(6, 5, seed=0), torch.arange(1.0, 6.0)
    chosen = NlsrSettings(region_score=score)
    found = neuron_scores(EffectiveWeight(full("w", m=W), "m"), RegionStatistics(None, norms), chosen)
    again = neuron_scores(EffectiveWeight(full("w", m=W), "m"), RegionStatistics(None, norms), chosen)
    assert torch.equal(found, again)
    if score != "random":
        torch.testing.assert_close(found, W.norm(dim=1) if score == "magnitude" else W.abs() @ norms)
    else:
        other = NlsrSettings(region_score=score, seed=1)
        assert not torch.equal(found, neuron_scores(EffectiveWeight(full("w", m=W), "m"), RegionStatistics(), other))


@pytest.mark.parametrize("score", ["low-rank", "magnitude", "wanda", "random"])
def test_factor_masks_follow_the_score(score: Any) -> None:
    factors, x = low_rank(8, 6, 4, seed=0), noise(30, 6, seed=2)
    ax = x @ factors.A.T
    statistics = RegionStatistics(ax.T @ ax / 30, (x.square().sum(dim=0)).sqrt())
    chosen = NlsrSettings(form="factor", region_score=score, sparsity=0.75, rank_sparsity=0.5)
    masks = factor_masks(factors, statistics, chosen, "m")
    assert masks.A.shape == factors.A.shape
    assert masks.B.shape == factors.B.shape
    assert (int(masks.A.sum()), int(masks.B.sum())) == (6, 8)
    if score == "magnitude":
        assert torch.equal(masks.A, entry_mask(factors.A.abs(), chosen))
    if score == "wanda":
        assert torch.equal(masks.B, entry_mask(factors.B.abs() * ax.norm(dim=0), chosen))


@pytest.mark.parametrize("score", ["low-rank", "wanda"])
def test_a_score_that_measures_needs_statistics(score: Any) -> None:
    chosen = NlsrSettings(region_score=score)
    with pytest.raises(CalibrationError, match="nothing was measured"):
        neuron_scores(EffectiveWeight(full("w", m=noise(3, 3, seed=0)), "m"), RegionStatistics(), chosen)
    with pytest.raises(CalibrationError, match="nothing was measured"):
        factor_masks(low_rank(3, 3, 2, seed=0), RegionStatistics(), chosen, "m")
