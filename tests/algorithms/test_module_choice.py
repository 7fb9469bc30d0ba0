"""Modules unlike the reference are patched more often; draws are the module's own; nothing divides by zero."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from algorithms.differences import Difference
from algorithms.low_rank import EffectiveWeight
from algorithms.module_choice import (
    choose_modules,
    factor_similarity,
    module_draw,
    patched_modules,
    row_similarity,
)
from algorithms.nlsr_settings import NlsrSettings
from algorithms.regions import FactorMasks
from algorithms.weights import LoraFactors
from tests.algorithms.fakes import full, lora, low_rank, noise

seeds = st.integers(0, 10_000)
names = st.text("abcdefgh.", min_size=1, max_size=6)
similarity_tables = st.dictionaries(names, st.floats(-1, 1), min_size=1, max_size=30)


@given(similarity_tables, st.floats(0.01, 0.5))
def test_the_chance_of_being_patched_falls_strictly_with_similarity(
    similarities: dict[str, float], epsilon: float
) -> None:
    choices = choose_modules(similarities, NlsrSettings(epsilon=epsilon))
    ordered = sorted(choices, key=lambda choice: choice.similarity)
    for one, next_one in itertools.pairwise(ordered):
        if one.similarity < next_one.similarity:
            assert one.kept_probability < next_one.kept_probability
            assert one.rank < next_one.rank
        else:
            assert (one.kept_probability, one.rank) == (next_one.kept_probability, next_one.rank)
    for choice in choices:
        assert 0.5 - epsilon - 1e-12 <= choice.kept_probability <= 0.5 + epsilon + 1e-12


def test_probabilities_span_the_range_and_average_to_its_middle() -> None:
    choices = choose_modules(dict(zip("abcde", (0.9, 0.1, 0.5, 0.3, 0.7), strict=True)), NlsrSettings())
    assert [choice.rank for choice in choices] == [5, 1, 3, 2, 4]
    assert [choice.kept_probability for choice in choices] == pytest.approx([0.7, 0.3, 0.5, 0.4, 0.6])


def test_modules_unlike_the_reference_are_patched_more_often() -> None:
    patched = {"unlike": 0, "like": 0}
    for seed in range(400):
        for choice in choose_modules({"unlike": 0.1, "like": 0.9}, NlsrSettings(seed=seed)):
            patched[choice.module] += choice.patched
    assert 0.6 < patched["unlike"] / 400 < 0.8
    assert 0.2 < patched["like"] / 400 < 0.4


@given(similarity_tables)
def test_the_published_code_turns_the_order_round(similarities: dict[str, float]) -> None:
    ours = choose_modules(similarities, NlsrSettings())
    theirs = choose_modules(similarities, NlsrSettings(selection="published-code"))
    for one, other in zip(ours, theirs, strict=True):
        assert other.kept_probability == pytest.approx(1 - one.kept_probability)
        assert other.draw == one.draw


@given(similarity_tables, names, st.floats(-1, 1), seeds)
def test_a_module_more_does_not_change_the_draws_of_the_others(
    similarities: dict[str, float], more: str, similarity: float, seed: int
) -> None:
    chosen = NlsrSettings(seed=seed)
    before = {choice.module: choice.draw for choice in choose_modules(similarities, chosen)}
    after = {choice.module: choice.draw for choice in choose_modules({more: similarity, **similarities}, chosen)}
    assert all(after[name] == draw for name, draw in before.items())
    assert choose_modules(similarities, chosen) == choose_modules(similarities, chosen)


def test_draws_differ_by_seed_and_module_and_are_spread() -> None:
    draws = [module_draw(f"layers.{block}.{kind}", seed) for block in range(50) for kind in "qkv" for seed in range(4)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.05


@given(similarity_tables, st.floats(-1, 1))
def test_a_threshold_patches_what_lies_below_it(similarities: dict[str, float], threshold: float) -> None:
    choices = choose_modules(similarities, NlsrSettings(selection="threshold", threshold=threshold))
    assert set(patched_modules(choices)) == {name for name, value in similarities.items() if value < threshold}
    assert all(choice.draw is None for choice in choices)


@given(similarity_tables)
def test_all_patches_all(similarities: dict[str, float]) -> None:
    choices = choose_modules(similarities, NlsrSettings(selection="all"))
    assert patched_modules(choices) == tuple(similarities)
    assert {choice.kept_probability for choice in choices} == {0.0}


def test_one_module_or_none_needs_no_rank() -> None:
    (only,) = choose_modules({"m": 0.3}, NlsrSettings())
    assert only.kept_probability == 0.5
    assert choose_modules({}, NlsrSettings()) == ()


@given(seeds, st.booleans())
def test_row_similarity_is_the_cosine_of_the_selected_rows(seed: int, dense: bool) -> None:
    base = full("b", m=noise(7, 5, seed=seed))
    one, other = low_rank(7, 5, 2, seed=seed + 1), low_rank(7, 5, 3, seed=seed + 5)
    rows = torch.tensor([0, 3, 6])
    adapters = [lora("e", base, m=one), lora("t", base, m=other)]
    if dense:
        merged = [full(f"merged{place}", m=adapter.rows("m", slice(0, 7))) for place, adapter in enumerate(adapters)]
        found = row_similarity(Difference(merged[0], base, "m"), Difference(merged[1], base, "m"), rows)
    else:
        found = row_similarity(Difference(adapters[0], base, "m"), Difference(adapters[1], base, "m"), rows)
    expected = torch.cosine_similarity((one.B @ one.A)[rows].reshape(-1), (other.B @ other.A)[rows].reshape(-1), 0)
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_rows_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (EffectiveWeight(full(name, m=noise(9, 5, seed=seed)), "m") for name, seed in (("e", 0), ("t", 1)))
    whole = row_similarity(one, other, torch.arange(9))
    monkeypatch.setattr("algorithms.module_choice.BLOCK_BYTES", 40)
    assert row_similarity(one, other, torch.arange(9)) == pytest.approx(whole, abs=1e-12)


@given(seeds, st.integers(1, 4))
def test_factor_similarity_is_the_cosine_of_the_masked_products(seed: int, rank: int) -> None:
    one, other = low_rank(6, 5, rank, seed=seed), low_rank(6, 5, rank, seed=seed + 7)
    masks = FactorMasks(noise(rank, 5, seed=seed) > 0, noise(6, rank, seed=seed + 3) > 0)
    products = [(masks.B * factors.B) @ (masks.A * factors.A) for factors in (one, other)]
    assume(all(bool(product.any()) for product in products))
    expected = torch.cosine_similarity(products[0].reshape(-1).double(), products[1].reshape(-1).double(), 0)
    assert factor_similarity(one, other, masks) == pytest.approx(float(expected), abs=1e-4)


@given(seeds, st.integers(1, 4))
def test_a_module_is_as_like_itself_as_can_be(seed: int, rank: int) -> None:
    factors = low_rank(6, 5, rank, seed=seed)
    everything = FactorMasks(torch.ones(rank, 5, dtype=torch.bool), torch.ones(6, rank, dtype=torch.bool))
    assert factor_similarity(factors, factors, everything) == pytest.approx(1.0)


def test_zero_norms_are_guarded() -> None:
    zero, some = LoraFactors(torch.zeros(2, 4), torch.zeros(5, 2), 1.0), low_rank(5, 4, 2, seed=0)
    everything = FactorMasks(torch.ones(2, 4, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool))
    nothing = FactorMasks(torch.zeros(2, 4, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.bool))
    assert factor_similarity(zero, some, everything) == 0.0
    assert factor_similarity(some, zero, everything) == 0.0
    assert factor_similarity(zero, zero, everything) == 1.0
    assert factor_similarity(some, some, nothing) == 1.0
    of_zero, of_some = (
        EffectiveWeight(full("w", m=weight), "m") for weight in (torch.zeros(3, 4), noise(3, 4, seed=1))
    )
    cases: list[tuple[Any, Any, float]] = [(of_zero, of_some, 0.0), (of_some, of_zero, 0.0), (of_zero, of_zero, 1.0)]
    for one, other, expected in cases:
        assert row_similarity(one, other, torch.arange(3)) == expected
    assert row_similarity(of_some, of_some, torch.arange(0)) == 1.0
    tiny = EffectiveWeight(full("w", m=torch.full((3, 4), 1e-40)), "m")
    assert row_similarity(tiny, tiny, torch.arange(3)) == pytest.approx(1.0)
