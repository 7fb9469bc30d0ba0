"""What several test processes have tried is counted together."""

import pytest

from tests.fault_tally import EDIT_TALLY, TALLY, EditTally, Tally, add_tallies, tallies


def test_the_counts_of_other_processes_are_added() -> None:
    reporting, first, second = pytest.Stash(), pytest.Stash(), pytest.Stash()
    first[TALLY] = Tally(points=3, kills=2)
    first[EDIT_TALLY] = EditTally(edits=5, unnoticed=1)
    second[TALLY] = Tally(points=4, mixtures=1)
    for other in (first, second, pytest.Stash()):
        add_tallies(reporting, tallies(other))
    add_tallies(reporting, {})  # a process that died
    assert str(reporting[TALLY]) == "fault injection: 7 points tried, 2 kills, 1 mixtures"
    assert reporting[EDIT_TALLY] == EditTally(edits=5, unnoticed=1)
