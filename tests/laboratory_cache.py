"""The trained laboratory, built once and kept between test runs.

Building takes about a minute, so it lies in `.cache/` under the project (or `$NEURONLEDGER_TEST_CACHE`); a change of
recipe or version builds it anew.
"""

import os
from pathlib import Path

import pytest

from algorithms.laboratory import Laboratory, build

SEED = 0


def cached_laboratory(seed: int = SEED) -> Laboratory:
    """The laboratory of a seed with the default recipe, from the cache when it is there."""
    root = Path(os.environ.get("NEURONLEDGER_TEST_CACHE", Path(__file__).parents[1] / ".cache"))
    return build(root / f"laboratory-{seed}", seed)


@pytest.fixture(scope="session")
def laboratory() -> Laboratory:
    """A trained laboratory: read only."""
    return cached_laboratory()
