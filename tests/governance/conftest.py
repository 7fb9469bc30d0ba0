"""Models, prompts and scenarios that the tests of the use cases share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from governance.workspace import Workspace
from registry.database import Registry
from tests.governance.scenarios import Scenario, Trio, build, write_prompts
from tests.tiny_models import save_adapter, save_model, save_variant

torch.set_num_threads(1)  # the models are so small that threads only wait for each other

Trios = Callable[..., Trio]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the prompt files."""
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def trios(tmp_path_factory: pytest.TempPathFactory) -> Trios:
    """Full checkpoints by family, dtype and sharding; made once, never written to."""
    made: dict[tuple[Any, ...], Trio] = {}

    def trio(family: str = "llama", dtype: torch.dtype = torch.float32, shard_size: str | None = None) -> Trio:
        key = (family, dtype, shard_size)
        if key not in made:
            place = tmp_path_factory.mktemp(f"{family}-models")
            base = save_model(place / "base", family, dtype=dtype, shard_size=shard_size)
            aligned = save_variant(base, place / "aligned", seed=1, shard_size=shard_size)
            subject = save_variant(aligned, place / "subject", seed=2, shard_size=shard_size)
            made[key] = Trio(subject, aligned, base)
        return made[key]

    return trio


@pytest.fixture(scope="session")
def adapter_trios(tmp_path_factory: pytest.TempPathFactory, trios: Trios) -> Trios:
    """LoRA subjects. `on_aligned`: the aligned model is the checkpoint under the adapter; else it is an adapter too."""
    made: dict[str, Trio] = {}

    def trio(*, on_aligned: bool, **settings: Any) -> Trio:
        key = f"{on_aligned} {sorted(settings.items(), key=str)}"
        if key not in made:
            full = trios()
            place = tmp_path_factory.mktemp("adapters")
            checkpoint = full.aligned if on_aligned else full.base
            subject = save_adapter(checkpoint, place / "subject", seed=3, **settings)
            if on_aligned:
                made[key] = Trio(subject, checkpoint, full.base, checkpoint)
            else:
                aligned = save_adapter(checkpoint, place / "aligned", seed=4, rank=3, alpha=5)
                made[key] = Trio(subject, aligned, checkpoint, checkpoint)
        return made[key]

    return trio


@pytest.fixture
def workspace(registry: Registry) -> Workspace:
    """A workspace in a fresh registry, on both databases."""
    return Workspace(registry=registry, actor="tester")


@pytest.fixture
def sqlite_workspace(sqlite_registry: Registry) -> Workspace:
    """A workspace in a fresh SQLite registry, for what does not turn on the database."""
    return Workspace(registry=sqlite_registry, actor="tester")


@pytest.fixture
def scenario(sqlite_workspace: Workspace, trios: Trios, prompts: Path) -> Scenario:
    """A lineage of a full Llama checkpoint in SQLite."""
    return build(sqlite_workspace, trios(), prompts)


@pytest.fixture
def lora_scenario(sqlite_workspace: Workspace, adapter_trios: Trios, prompts: Path) -> Scenario:
    """A lineage of a LoRA subject whose aligned model is another adapter, so that ranks grow."""
    return build(sqlite_workspace, adapter_trios(on_aligned=False), prompts)
