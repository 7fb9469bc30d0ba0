"""Differences of weights: dense, factored, and what makes them one or the other."""

import pytest
import torch

from algorithms import differences
from algorithms.differences import Difference, require_finite_values, same_checkpoint, squared_norm
from algorithms.errors import NonFiniteError
from algorithms.weights import LoraFactors
from tests.algorithms.fakes import full, lora, low_rank, noise

BASE = full("base", m=noise(7, 5, seed=0))
OTHER = full("other", m=noise(7, 5, seed=1))
ONE = lora("one", BASE, m=low_rank(7, 5, 2, seed=2))
TWO = lora("two", BASE, m=low_rank(7, 5, 3, seed=4, scale=0.5))
ELSEWHERE = lora("elsewhere", OTHER, m=low_rank(7, 5, 2, seed=2))
BARE = lora("bare", BASE)
PAIRS = [(ONE, BASE), (BASE, ONE), (ONE, TWO), (BASE, OTHER), (ONE, OTHER), (ELSEWHERE, ONE), (BARE, TWO), (BARE, BASE)]


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_rows_are_the_difference_of_effective_rows(x, y) -> None:
    expected = x.rows("m", slice(0, 7)) - y.rows("m", slice(0, 7))
    difference = Difference(x, y, "m")
    assert difference.shape == (7, 5)
    torch.testing.assert_close(difference.rows(slice(2, 6)), expected[2:6], atol=1e-5, rtol=1e-5)
    index = torch.tensor([6, 0])
    torch.testing.assert_close(difference.rows(index), expected[index], atol=1e-5, rtol=1e-5)
    assert difference.norm() == pytest.approx(float(expected.double().norm()), rel=1e-5)


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_models_on_one_checkpoint_differ_by_factors(x, y) -> None:
    factors = Difference(x, y, "m").factors()
    assert (factors is not None) == same_checkpoint(x, y)
    if factors is not None:
        expected = x.rows("m", slice(0, 7)) - y.rows("m", slice(0, 7))
        torch.testing.assert_close(factors[0] @ factors[1], expected, atol=1e-5, rtol=1e-5)


def test_adapters_with_one_basis_share_it() -> None:
    factors = ONE.lora["m"]
    twin = lora("twin", BASE, m=LoraFactors(factors.A, factors.B.clone(), factors.scale))
    found = Difference(ONE, twin, "m").factors()
    assert found is not None
    assert found[0].shape == (7, 2)
    assert torch.equal(found[0], torch.zeros(7, 2))


def test_blocks_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "STREAM_BYTES", 4 * 5 * 3)
    difference = Difference(BASE, OTHER, "m")
    blocks = list(difference.blocks())
    assert [(block.start, block.stop) for block, _ in blocks] == [(0, 3), (3, 6), (6, 7)]
    assert torch.equal(torch.cat([rows for _, rows in blocks]), BASE.weights["m"] - OTHER.weights["m"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_module_name(bad: float) -> None:
    broken = full("broken", m=torch.full((7, 5), bad))
    with pytest.raises(NonFiniteError, match=r"of m holds NaN"):
        Difference(broken, BASE, "m").rows(slice(0, 1))
    factors = ONE.lora["m"]
    with pytest.raises(NonFiniteError, match="lora_B of m"):
        Difference(lora("bad", BASE, m=LoraFactors(factors.A, factors.B * bad, 1.0)), BASE, "m")


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf"), float("-inf")], [float("-inf"), 3e38, 3e38]])
def test_no_sum_hides_nan_or_infinity(values: list[float]) -> None:
    with pytest.raises(NonFiniteError, match="The row of m holds NaN"):
        require_finite_values(torch.tensor(values), "m", "The row")


@pytest.mark.parametrize("values", [[3e38, 3e38, -1.0], []])
def test_finite_values_pass_even_where_their_sum_overflows(values: list[float]) -> None:
    given = torch.tensor(values)
    assert require_finite_values(given, "m", "The row") is given


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e15, 1e30, 1e37])
def test_the_squared_norm_of_any_float32_is_found(scale: float) -> None:
    rows = scale * noise(40, 33, seed=7)
    assert squared_norm(rows) == pytest.approx(float(rows.double().square().sum()), rel=1e-6)
    mixed = torch.cat([rows, noise(3, 33, seed=8)])
    assert squared_norm(mixed) == pytest.approx(float(mixed.double().square().sum()), rel=1e-6)
