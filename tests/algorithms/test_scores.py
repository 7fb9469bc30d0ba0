"""Scores against their formulas."""

import pytest
import torch

from algorithms import differences, scores
from algorithms.differences import Difference
from algorithms.scores import (
    against_baseline,
    contrast_scores,
    damage_scores,
    factored_damage_scores,
    random_scores,
    update_norm_scores,
    wanda_scores,
)
from algorithms.statistics import OutputMoments
from tests.algorithms.fakes import full, lora, low_rank, noise

X = noise(40, 5, seed=7)
G = X.T @ X / 40
ALIGNED = full("aligned", m=noise(9, 5, seed=0))
SUBJECT = full("subject", m=ALIGNED.weights["m"] + noise(9, 5, seed=1))
U = SUBJECT.weights["m"] - ALIGNED.weights["m"]


def test_wanda_weighs_every_entry_by_the_norm_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK_BYTES", 4 * 5 * 2)
    expected = (SUBJECT.weights["m"].abs() * X.norm(dim=0)).sum(dim=1)
    torch.testing.assert_close(wanda_scores(SUBJECT, "m", X.norm(dim=0).double()), expected)


def test_damage_is_the_mean_energy_that_the_update_adds_to_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "STREAM_BYTES", 4 * 5 * 2)
    expected = (X @ U.T).square().mean(dim=0) / 5
    torch.testing.assert_close(damage_scores(Difference(SUBJECT, ALIGNED, "m"), G), expected)


def test_damage_of_a_low_rank_update_needs_projected_inputs_only() -> None:
    adapter = lora("adapter", ALIGNED, m=low_rank(9, 5, 2, seed=4))
    update = Difference(adapter, ALIGNED, "m")
    factors = update.factors()
    assert factors is not None
    z = X @ factors[1].T
    found = factored_damage_scores(update, factors[0], z.T @ z / 40)
    torch.testing.assert_close(found, damage_scores(update, G), atol=1e-5, rtol=1e-4)


def test_rounding_never_makes_damage_negative() -> None:
    direction = noise(1, 5, seed=3)
    inputs = direction - (direction @ U[:1].T) / (U[:1] @ U[:1].T) * U[:1]
    assert float(damage_scores(Difference(SUBJECT, ALIGNED, "m"), inputs.T @ inputs)[0]) >= 0.0


def test_damage_against_a_baseline() -> None:
    harmful, benign = torch.tensor([4.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.0])
    assert against_baseline(harmful, benign, "none") is harmful
    assert against_baseline(harmful, benign, "minus").tolist() == [2.0, 0.0, 2.0]
    over = against_baseline(harmful, benign, "over")
    assert over.tolist() == pytest.approx([4 / 2.001, 1 / 1.001, 2 / 0.001])
    assert torch.equal(against_baseline(harmful, torch.zeros(3), "over"), harmful)


def test_update_norm_is_the_squared_length_of_the_row() -> None:
    torch.testing.assert_close(update_norm_scores(Difference(SUBJECT, ALIGNED, "m")), U.square().sum(dim=1))


def test_contrast_is_the_difference_in_pooled_standard_deviations() -> None:
    here, there = noise(30, 4, seed=1).abs().double(), noise(50, 4, seed=2).abs().double() * 2
    moments = [OutputMoments(y.mean(dim=0), y.var(dim=0, correction=0), len(y)) for y in (here, there)]
    pooled = ((30 * moments[0].variance + 50 * moments[1].variance) / 80).sqrt()
    expected = ((here.mean(dim=0) - there.mean(dim=0)) / pooled).float()
    torch.testing.assert_close(contrast_scores(*moments), expected)
    torch.testing.assert_close(contrast_scores(*reversed(moments)), -expected)


def test_neurons_that_never_vary_have_no_contrast() -> None:
    silent = OutputMoments(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 5)
    assert contrast_scores(silent, silent).tolist() == [0.0, 0.0]


def test_random_scores_belong_to_their_module_seed_and_side() -> None:
    one = random_scores("a", 50, 1, "harmful")
    assert torch.equal(one, random_scores("a", 50, 1, "harmful"))
    for other in (("b", 50, 1, "harmful"), ("a", 50, 2, "harmful"), ("a", 50, 1, "benign")):
        assert not torch.equal(one, random_scores(*other))
