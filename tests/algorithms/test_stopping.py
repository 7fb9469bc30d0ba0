"""Where taking parts of an update back ends, and which input directions are taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.fgsn import Identification
from algorithms.identifications import StoredIdentification
from algorithms.settings import FgsnSettings
from tests.algorithms.lineages import Lineage, run

DIRECTIONS: dict[str, Any] = {
    "protect": "directions",
    "operation": "subspace",
    "direction_choice": "attribution",
    "directions": 5,
}


@pytest.fixture(scope="module", params=["full_lineage", "continued_lineage"])
def damaged(request: pytest.FixtureRequest) -> Lineage:
    """A lineage whose subject gives the answers less readily than its aligned model: one of two ways round."""
    lineage: Lineage = request.getfixturevalue(request.param)
    return lineage if lost(run(lineage, FgsnSettings())) > 0 else exchanged(lineage)


def exchanged(lineage: Lineage) -> Lineage:
    return Lineage(lineage.aligned, lineage.subject, lineage.base, lineage.aligned_under, lineage.under)


def lost(found: Identification) -> float:
    assert found.head_loss is not None
    assert found.aligned_loss is not None
    return found.head_loss - found.aligned_loss


def test_rows_are_taken_until_they_gain_what_was_lost(damaged: Lineage) -> None:
    whole = run(damaged, FgsnSettings(budget=1.0))
    needed = lost(whole)
    found = run(damaged, FgsnSettings(budget=1.0, stop_at=0.5))
    subject, _ = damaged.sources()
    sizes = {name: module.in_features for name, module in subject.modules.items()}

    def gains(of: Identification) -> list[float]:
        scored = [
            (score, score * sizes[part.module])
            for part in of.modules
            for score in part.scores[part.selected].double().tolist()
        ]
        return [gain for _, gain in sorted(scored, reverse=True)]

    taken = gains(found)
    assert taken == gains(whole)[: len(taken)]
    assert 0 < len(taken) < len(gains(whole))
    assert sum(taken[:-1]) < 0.5 * needed <= sum(taken) + 1e-9


def test_rows_that_a_patch_claims_gain_nothing_more(damaged: Lineage) -> None:
    settings = FgsnSettings(budget=1.0, stop_at=0.5)
    first = run(damaged, settings)
    protected = {part.module: part.selected for part in first.modules}
    second = run(damaged, settings, protected=protected)
    fresh = [len(part.selected) - len(part.already_protected) for part in second.modules]
    assert sum(fresh) > 0
    assert sum(len(part.already_protected) for part in second.modules) == sum(map(len, protected.values()))


def test_where_the_head_gives_the_answers_as_readily_nothing_is_taken(damaged: Lineage) -> None:
    healthy = exchanged(damaged)
    for settings in (FgsnSettings(stop_at=1.25), FgsnSettings(stop_at=1.25, **DIRECTIONS)):
        found = run(healthy, settings)
        assert lost(found) <= 0
        assert not any(len(part.selected) for part in found.modules)
    assert any(len(part.selected) for part in run(healthy, FgsnSettings(stop_at=0)).modules)


def columns(found: Identification) -> dict[str, Tensor]:
    return {part.module: part.directions for part in found.modules if part.directions is not None}


def test_chosen_directions_are_leading_ones_and_every_row_of_their_modules_is_written(damaged: Lineage) -> None:
    leading = columns(run(damaged, FgsnSettings(**{**DIRECTIONS, "direction_choice": "leading"})))
    found = run(damaged, FgsnSettings(**DIRECTIONS))
    chosen = columns(found)
    assert 0 < sum(Q.shape[1] for Q in chosen.values()) < sum(Q.shape[1] for Q in leading.values())
    for part in found.modules:
        Q = chosen[part.module]
        places = (leading[part.module].T @ Q).abs()
        assert bool((places.max(dim=0).values > 1 - 1e-5).all()) or not Q.shape[1]
        assert len(part.selected) == (len(part.scores) if Q.shape[1] else 0)


def test_fewer_directions_are_enough_for_less(damaged: Lineage) -> None:
    def count(stop_at: float) -> int:
        return sum(Q.shape[1] for Q in columns(run(damaged, FgsnSettings(stop_at=stop_at, **DIRECTIONS))).values())

    some, every = count(0.3), count(0)
    assert 0 < some < every
    assert count(1000) == every


def test_rows_claimed_as_neurons_have_no_say_in_which_directions_are_chosen(damaged: Lineage) -> None:
    every_row = {name: torch.arange(module.out_features) for name, module in damaged.sources()[0].modules.items()}
    found = run(damaged, FgsnSettings(**DIRECTIONS), protected=every_row)
    assert all(not Q.shape[1] for Q in columns(found).values())


def test_what_was_chosen_is_read_back_with_its_losses(damaged: Lineage) -> None:
    found = run(damaged, FgsnSettings(stop_at=0.5, **DIRECTIONS))
    again = StoredIdentification(found.summary(), found.tensors()).whole()
    assert (again.head_loss, again.aligned_loss) == (found.head_loss, found.aligned_loss)
    for part, other in zip(found.modules, again.modules, strict=True):
        assert part.directions is not None
        assert other.directions is not None
        assert torch.equal(part.directions, other.directions)
