"""How many faults a run of the tests has tried, and how many edits of the record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pytest


@dataclass
class Tally:
    """How many points have been tried."""

    points: int = 0
    kills: int = 0
    mixtures: int = 0

    def count(self, *, kills: bool) -> None:
        """Count one point."""
        self.points += 1
        self.kills += kills

    def __str__(self) -> str:
        return f"fault injection: {self.points} points tried, {self.kills} kills, {self.mixtures} mixtures"


@dataclass
class EditTally:
    """How many edits of rows, artifacts and events were tried, and how many of them audit verify did not name."""

    edits: int = 0
    unnoticed: int = 0

    def __str__(self) -> str:
        return f"edits behind the ledger's back: {self.edits} tried, {self.unnoticed} not named by audit verify"


TALLY = pytest.StashKey[Tally]()
EDIT_TALLY = pytest.StashKey[EditTally]()


def tallies(stash: pytest.Stash) -> dict[str, dict[str, int]]:
    """What a process has counted, in plain values."""
    return {"faults": asdict(stash.get(TALLY, Tally())), "edits": asdict(stash.get(EDIT_TALLY, EditTally()))}


def add_tallies(stash: pytest.Stash, other: Mapping[str, Mapping[str, int]]) -> None:
    """Add what another process has counted."""
    for name, tally in (
        ("faults", stash.setdefault(TALLY, Tally())),
        ("edits", stash.setdefault(EDIT_TALLY, EditTally())),
    ):
        for field, count in other.get(name, {}).items():
            setattr(tally, field, getattr(tally, field) + count)
