"""What the changed rows of a module come to."""

import pytest
import torch

from governance.row_figures import RowFigures, differing_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_figures_are_of_all_blocks_and_leave_the_rows_as_they_are(dtype: torch.dtype) -> None:
    figures = RowFigures("up_proj")
    old, new = torch.ones(3, 4, dtype=dtype), torch.full((3, 4), 3.0, dtype=dtype)
    new[2] = old[2]
    kept = new.clone()
    figures.add(old[:1], new[:1])
    figures.add(old[1:], new[1:])
    assert torch.equal(new, kept)
    found = figures.outcome()
    assert (found.module, found.rows, found.rows_unchanged) == ("up_proj", 3, 1)
    assert found.change_norm == pytest.approx(32**0.5)
    assert found.norm_before == pytest.approx(12**0.5)
    assert found.norm_after == pytest.approx(76**0.5)


def test_rows_that_gain_columns_had_zeros_there() -> None:
    figures = RowFigures("up_proj")
    figures.add(torch.ones(2, 1), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    found = figures.outcome()
    assert (found.rows, found.rows_unchanged) == (2, 1)
    assert found.change_norm == pytest.approx(2)
    assert found.norm_after == pytest.approx(6**0.5)


def test_squares_that_float32_does_not_hold_are_summed_all_the_same() -> None:
    figures = RowFigures("up_proj")
    figures.add(torch.full((1, 4), 1e25), torch.full((1, 4), 3e25))
    found = figures.outcome()
    assert found.norm_after == pytest.approx(6e25)
    assert found.change_norm == pytest.approx(4e25)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 3), (torch.bfloat16, 2), (torch.float32, 1), (torch.float16, 8)]
)
def test_rows_differ_where_a_byte_does(dtype: torch.dtype, width: int) -> None:
    old = torch.zeros(4, width, dtype=dtype)
    new = old.clone()
    new[1, width - 1] = -0.0
    new[2, 0] = torch.finfo(dtype).tiny
    assert differing_rows(old, new).tolist() == [False, True, True, False]
    apart = torch.zeros(4, width + 1, dtype=dtype)[:, :width]  # rows that do not follow one another in memory
    assert differing_rows(apart, new).tolist() == [False, True, True, False]
