"""Rates with their uncertainty."""

import math
from dataclasses import dataclass

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share of n trials with its 95 % interval; all three between 0 and 1."""

    successes: int
    n: int
    value: float
    low: float
    high: float


def wilson_rate(successes: int, n: int) -> Rate:
    """Return the share of successes with Wilson's score interval (E. B. Wilson, 1927) at 95 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no rate")
    share = successes / n
    spread = _Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Rate(successes, n, share, max(0.0, centre - half), min(1.0, centre + half))
