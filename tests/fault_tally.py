"""How many faults a run of the tests has tried."""

from dataclasses import dataclass

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


TALLY = pytest.StashKey[Tally]()
