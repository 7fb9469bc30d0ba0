"""Lineages of tiny random models: full checkpoints, an adapter, an adapter trained on."""

import pytest

from tests.algorithms.lineages import DEPTH, Lineage
from tests.tiny_models import save_adapter, save_model, save_variant


@pytest.fixture(scope="session")
def full_lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    home = tmp_path_factory.mktemp("full")
    base = save_model(home / "base", num_hidden_layers=DEPTH)
    aligned = save_variant(base, home / "aligned", seed=1)
    return Lineage(save_variant(aligned, home / "subject", seed=2), aligned, base)


@pytest.fixture(scope="session")
def adapter_lineage(tmp_path_factory: pytest.TempPathFactory, full_lineage: Lineage) -> Lineage:
    home = tmp_path_factory.mktemp("adapter")
    subject = save_adapter(full_lineage.aligned, home / "subject", targets=["q_proj", "v_proj", "down_proj"], seed=3)
    return Lineage(subject, full_lineage.aligned, full_lineage.base, under=full_lineage.aligned)


@pytest.fixture(scope="session")
def continued_lineage(tmp_path_factory: pytest.TempPathFactory, full_lineage: Lineage) -> Lineage:
    home = tmp_path_factory.mktemp("continued")
    aligned = save_adapter(full_lineage.base, home / "aligned", seed=4)
    subject = save_adapter(full_lineage.base, home / "subject", seed=5)
    return Lineage(subject, aligned, full_lineage.base, full_lineage.base, full_lineage.base)
