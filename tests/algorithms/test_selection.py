"""Which rows are chosen: budgets, differences, ties, and what successive dimensions may share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.selection import ScoredModule, entry_threshold, gaining_directions, new_rows, rank_correlation, select
from algorithms.settings import FgsnSettings

# Few different values, so that ties are common.
values = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=15)
modules_of_scores = st.lists(
    st.tuples(values, st.integers(1, 9), st.randoms(use_true_random=False)), min_size=1, max_size=4
)


def scored(drawn: list[tuple[list[float], int, object]]) -> list[ScoredModule]:
    found = []
    for scores, row_parameters, random in drawn:
        benign = list(scores)
        random.shuffle(benign)  # type: ignore[attr-defined]
        found.append(ScoredModule(torch.tensor(scores), torch.tensor(benign), row_parameters))
    return found


def parameters(modules: list[ScoredModule]) -> int:
    return sum(len(module.scores) * module.row_parameters for module in modules)


@settings(max_examples=150, deadline=None)
@given(modules_of_scores, st.sampled_from(["module", "all"]), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_the_difference_never_meets_the_benign_top(drawn, ranking, q: float, p: float) -> None:
    modules = scored(drawn)
    chosen = FgsnSettings(score="wanda", selection="difference", ranking=ranking, harmful_share=q, benign_share=p)
    selection = select(modules, chosen, parameters(modules))
    pools = [modules] if ranking == "all" else [[module] for module in modules]
    parts = [selection.modules] if ranking == "all" else [[part] for part in selection.modules]
    for pool, found in zip(pools, parts, strict=True):
        sizes = [len(module.scores) for module in pool]
        top_q = naive_top(torch.cat([module.scores for module in pool]), q)
        top_p = naive_top(torch.cat([module.benign_scores for module in pool]), p)
        selected = mask_of([part.selected for part in found], sizes)
        overlap = mask_of([part.benign_overlap for part in found], sizes)
        assert torch.equal(selected, top_q & ~top_p)
        assert torch.equal(overlap, top_q & top_p)
    if ranking == "all":
        assert selection.overlap == pytest.approx(int(overlap.sum()) / int(top_q.sum()))


@settings(max_examples=150, deadline=None)
@given(modules_of_scores, st.floats(0.01, 1.0))
def test_a_budget_over_all_modules_is_filled_by_rank_and_never_exceeded(drawn, budget: float) -> None:
    modules = scored(drawn)
    total = parameters(modules) + 40  # modules out of scope count in the whole
    selection = select(modules, FgsnSettings(score="wanda", budget=budget), total)
    cost = sum(
        len(part.selected) * module.row_parameters for part, module in zip(selection.modules, modules, strict=True)
    )
    assert cost <= budget * total + 0.5
    ranks = torch.cat([part.ranks for part in selection.modules])
    chosen = mask_of([part.selected for part in selection.modules], [len(module.scores) for module in modules])
    assert torch.equal(ranks.sort().values, torch.arange(len(ranks)))
    by_rank = chosen[ranks.argsort()]
    assert bool((by_rank[:-1] >= by_rank[1:]).all()), "no row is chosen after one that was not"
    left = [rank for rank, taken in enumerate(by_rank.tolist()) if not taken]
    if left:
        costs = torch.cat([torch.full((len(m.scores),), m.row_parameters) for m in modules])[ranks.argsort()]
        assert cost + int(costs[left[0]]) > budget * total


def test_a_budget_per_module_takes_the_same_share_of_each() -> None:
    modules = [ScoredModule(torch.arange(20.0), None, 5), ScoredModule(torch.arange(10.0), None, 7)]
    selection = select(modules, FgsnSettings(score="wanda", ranking="module", budget=0.3), parameters(modules))
    assert [part.selected.tolist() for part in selection.modules] == [[14, 15, 16, 17, 18, 19], [7, 8, 9]]


def test_a_budget_of_the_whole_model_is_concentrated_on_the_scope() -> None:
    modules = [ScoredModule(torch.arange(10.0), None, 4)]
    selection = select(modules, FgsnSettings(score="wanda", ranking="module", budget=0.1), 160)
    assert len(selection.modules[0].selected) == 4


def test_ties_fall_to_the_earlier_module_and_the_lower_row() -> None:
    modules = [ScoredModule(torch.tensor([1.0, 2.0, 2.0]), None, 1), ScoredModule(torch.tensor([2.0, 2.0]), None, 1)]
    selection = select(modules, FgsnSettings(score="wanda", budget=0.6), 5)
    assert [part.selected.tolist() for part in selection.modules] == [[1, 2], [0]]


@pytest.mark.parametrize("selection", ["budget", "difference"])
def test_rows_without_damage_are_never_chosen(selection) -> None:
    modules = [ScoredModule(torch.tensor([0.0, 0.2, 0.0, -1.0]), torch.zeros(4), 1)]
    chosen = FgsnSettings(score="damage", selection=selection, budget=1.0, harmful_share=1.0)
    assert select(modules, chosen, 4).modules[0].selected.tolist() == [1]


gain_modules = st.lists(
    st.tuples(
        st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12), st.integers(1, 9), st.sets(st.integers(0, 11))
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(gain_modules, st.floats(0.05, 1.0), st.floats(0.1, 3.0), st.floats(0.0, 20.0))
def test_taking_ends_with_the_row_that_gains_what_was_lost(drawn, budget: float, multiple: float, lost: float) -> None:
    modules = [
        ScoredModule(torch.tensor(scores), None, size, torch.tensor([row for row in held if row < len(scores)]).long())
        for scores, size, held in drawn
    ]
    total = parameters(modules)
    unlimited = select(modules, FgsnSettings(budget=budget, stop_at=0), total, lost)
    found = select(modules, FgsnSettings(budget=budget, stop_at=multiple), total, lost)
    by_rank: list[tuple[int, float]] = []
    for module, whole, part in zip(modules, unlimited.modules, found.modules, strict=True):
        assert set(part.selected.tolist()) <= set(whole.selected.tolist())
        assert torch.equal(part.ranks, whole.ranks)
        rows = new_rows(part.selected, module.protected)
        gains = module.scores[rows].double() * module.row_parameters
        by_rank += zip(part.ranks[rows].tolist(), gains.tolist(), strict=True)
    gained = sum(gain for _, gain in by_rank)
    last = max(by_rank, default=(0, 0.0))[1]
    assert gained - last <= multiple * lost + 1e-6, "the row before the last did not gain enough"
    if any(
        len(part.selected) < len(whole.selected) for part, whole in zip(found.modules, unlimited.modules, strict=True)
    ):
        assert gained >= multiple * lost - 1e-6, "it ends early only where enough is gained"


def test_where_nothing_was_lost_no_row_is_taken() -> None:
    modules = [ScoredModule(torch.tensor([3.0, 1.0]), None, 2)]
    for lost in (0.0, -0.5):
        assert not len(select(modules, FgsnSettings(budget=1.0, stop_at=1), 4, lost).modules[0].selected)


@pytest.mark.parametrize(
    "more", [{"stop_at": 0}, {"selection": "difference", "benign_share": 0, "harmful_share": 1}, {"score": "damage"}]
)
def test_only_a_budget_of_attribution_is_ended_early(more) -> None:
    modules = [ScoredModule(torch.tensor([3.0, 1.0]), None, 2)]
    assert len(select(modules, FgsnSettings(**{"budget": 1, "stop_at": 1, **more}), 4, 0.0).modules[0].selected) == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8), min_size=1, max_size=4), st.floats(-1, 12)
)
def test_directions_are_taken_by_gain_until_it_is_enough(drawn: list[list[float]], wanted: float) -> None:
    gains = [torch.tensor(values) for values in drawn]
    every = torch.cat(gaining_directions(gains, None))
    values = torch.cat(gains)
    assert torch.equal(every, values > 0)
    masks = gaining_directions(gains, wanted)
    assert [len(mask) for mask in masks] == [len(each) for each in gains]
    taken = torch.cat(masks)
    assert not bool((taken & ~every).any())
    gained = float(values[taken].double().sum())
    if bool(taken.any()):
        smallest = float(values[taken].min())
        assert gained - smallest <= wanted + 1e-6
        assert smallest >= float(values[every & ~taken].max()) if bool((every & ~taken).any()) else True
    if bool((every & ~taken).any()):
        assert gained >= wanted - 1e-6


def test_identical_rankings_overlap_as_far_as_the_shares_allow() -> None:
    scores = torch.arange(100.0)
    chosen = FgsnSettings(score="wanda", selection="difference", ranking="module", harmful_share=0.4, benign_share=0.1)
    found = select([ScoredModule(scores, scores * 2, 3)], chosen, 300)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.overlap == pytest.approx(0.25)
    assert found.modules[0].selected.tolist() == list(range(60, 90))


def test_without_a_benign_side_there_is_no_overlap_to_report() -> None:
    found = select([ScoredModule(torch.arange(4.0), None, 1)], FgsnSettings(score="update-norm"), 4)
    assert (found.overlap, found.rank_correlation, found.modules[0].overlap) == (None, None, None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30)), min_size=1, max_size=6))
def test_successive_dimensions_claim_disjoint_rows(dimensions: list[set[int]]) -> None:
    protected = torch.zeros(0, dtype=torch.int64)
    for rows in dimensions:
        selected = torch.tensor(sorted(rows), dtype=torch.int64)
        new = new_rows(selected, protected)
        assert not set(new.tolist()) & set(protected.tolist())
        assert set(new.tolist()) | set(protected.tolist()) >= rows
        protected = torch.cat([protected, new])
        assert len(new_rows(selected, protected)) == 0, "the same dimension twice selects nothing new"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60),
    st.integers(1, 5),
    st.data(),
)
def test_the_entry_threshold_is_the_exact_order_statistic(drawn: list[float], parts: int, data) -> None:
    numbers = torch.tensor(drawn, dtype=torch.float32)
    count = data.draw(st.integers(1, len(drawn)))
    found = entry_threshold(lambda: numbers.chunk(parts), count)
    assert found == float(numbers.sort(descending=True).values[count - 1])


def test_rank_correlation_is_spearmans() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5.0, 6.0, 7.0, 8.0, 7.0])
    assert rank_correlation(x, y) == pytest.approx(0.8207826816681233)  # scipy.stats.spearmanr, with a tie
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    assert rank_correlation(x, torch.ones(5)) is None


def naive_top(scores: Tensor, share: float) -> Tensor:
    count = max(1, round(share * len(scores))) if share > 0 else 0
    order = sorted(range(len(scores)), key=lambda row: (-float(scores[row]), row))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def mask_of(rows: list[Tensor], sizes: list[int]) -> Tensor:
    masks = []
    for part, size in zip(rows, sizes, strict=True):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[part] = True
        masks.append(mask)
    return torch.cat(masks)
