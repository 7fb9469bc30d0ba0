"""The digests of a change are those of its bytes, however many threads read them and however the file is cut up."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms import parallel
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.digests import ExpectedContent, new_checksum
from governance import row_files
from governance.errors import WeightsChangedError
from governance.patch_artifact import open_artifact
from governance.row_files import TensorChange, tensor_changes, write_rows
from tests.governance.conftest import Scenarios, Trios
from tests.governance.faults import flip_byte
from tests.governance.scenarios import Scenario

THREADS = [1, 2, 8]


@pytest.mark.parametrize("form", [{"shard_size": "6KB"}, {"family": "gpt2"}], ids=["shards", "stored transposed"])
def test_digests_of_a_change_do_not_depend_on_threads_or_blocks(
    trios: Trios, scenarios: Scenarios, monkeypatch: pytest.MonkeyPatch, form: Mapping[str, Any]
) -> None:
    scenario = scenarios(trios(**form))
    scenario.apply("animals")
    subject, head = Checkpoint.open(scenario.trio.subject), Checkpoint.open(scenario.working)
    with open_artifact(scenario.artifact(1)) as artifact:
        names = [module.tensor for module in artifact.modules]
        expected = {
            name: TensorChange(name, _digest(head, name), _content(subject, name), replaces=True) for name in names
        }
        for threads in THREADS:
            for block_bytes in (100, 2**20):
                monkeypatch.setattr(parallel, "THREADS", threads)
                monkeypatch.setattr(row_files, "BLOCK_BYTES", block_bytes)
                assert tensor_changes(head, artifact, "old", {}) == expected


@pytest.mark.parametrize("threads", THREADS)
def test_of_several_tensors_that_somebody_changed_the_first_is_named(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Also where a later one is larger, so that it is hashed before."""
    monkeypatch.setattr(parallel, "THREADS", threads)
    scenario.apply("animals", budget=0.5)
    checkpoint = Checkpoint.open(scenario.working)
    with open_artifact(scenario.artifact(1)) as artifact:
        touched = [checkpoint.stored(module.tensor) for module in artifact.modules]
    smallest = min(range(len(touched)), key=lambda place: _size(touched[place]))
    assert any(_size(later) > _size(touched[smallest]) for later in touched[smallest + 1 :])
    for stored in touched[smallest:]:
        flip_byte(scenario.working / stored.file, stored.begin)
    with pytest.raises(WeightsChangedError, match=f"^{touched[smallest].name} of the working checkpoint"):
        scenario.revert()


@pytest.mark.parametrize(
    "change", [lambda tensor, _: tensor.half(), lambda tensor, last: tensor[:last]], ids=["dtype", "rows"]
)
def test_rows_are_not_written_into_a_tensor_that_somebody_saved_in_another_form(
    scenario: Scenario, tmp_path: Path, change: Callable[[Tensor, int], Tensor]
) -> None:
    scenario.apply("animals", budget=0.5)
    saved = Path(shutil.copytree(scenario.working, tmp_path / "saved"))
    with open_artifact(scenario.artifact(1)) as artifact:
        touched = artifact.modules[-1]
        file = saved / Checkpoint.open(saved).stored(touched.tensor).file
        tensors = load_file(file)
        tensors[touched.tensor] = change(tensors[touched.tensor], int(artifact.rows(touched.name)[-1])).clone()
        save_file(tensors, file)
        content, checkpoint = file.read_bytes(), Checkpoint.open(saved)
        with pytest.raises(WeightsChangedError, match=f"^{touched.tensor} of {saved} is of another shape or dtype"):
            tensor_changes(checkpoint, artifact, "old", {})
        with pytest.raises(WeightsChangedError, match=f"^{touched.tensor} of {saved} is of another shape or dtype"):
            write_rows(checkpoint, artifact, "old")
    assert file.read_bytes() == content


def _size(stored: StoredTensor) -> int:
    return stored.end - stored.begin


def _digest(checkpoint: Checkpoint, tensor: str) -> str:
    return blake3(_bytes(checkpoint, tensor)).hexdigest()


def _content(checkpoint: Checkpoint, tensor: str) -> ExpectedContent:
    checksum = new_checksum()
    checksum.update(_bytes(checkpoint, tensor))
    return ExpectedContent(_digest(checkpoint, tensor), checksum.hexdigest())


def _bytes(checkpoint: Checkpoint, tensor: str) -> bytes:
    stored = checkpoint.stored(tensor)
    return (checkpoint.path / stored.file).read_bytes()[stored.begin : stored.end]
