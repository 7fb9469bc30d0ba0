"""A prepared patch in memory: the model that its artifact would make of the head, with nothing written to the head.

Of a full checkpoint, the head is loaded and the artifact's new rows are laid over its weights. Of an adapter, the very
files that applying would write are composed in a directory of their own and loaded from there. Either way the bytes are
those of the artifact, rounded where the policy has models run in 16 bits, and the digest is the one that the weights
will have once the patch is written.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from algorithms.errors import UnsupportedModelError
from algorithms.loading import linear_module, load_tokenizer
from governance.errors import WeightsChangedError
from governance.lineage_state import LineageState
from governance.patch_artifact import BLOCK_BYTES, ArtifactModule, PatchArtifact, open_artifact
from governance.placement import Placement
from governance.planning import PreparedPatch
from governance.weight_state import digest_of
from governance.working_files import Change, LineageFiles, compose_in


@dataclass(frozen=True)
class Candidate:
    """What a lineage would become.

    Attributes:
        digest: of its weights.
        load: loads the model, which is not kept here.
        tokenizer: of the head.
    """

    digest: str
    load: Callable[[], nn.Module]
    tokenizer: Callable[[], Any]


@contextmanager
def candidate_of(ready: PreparedPatch, placement: Placement) -> Iterator[Candidate]:
    """The model that a prepared patch would leave; it can be loaded until the end.

    Args:
        ready: the patch.
        placement: how models are loaded.

    Raises:
        OSError: an adapter cannot be composed in the temporary directory.
    """
    lineage = ready.plan.lineage
    base = lineage.locations["subject"].base_path

    def tokenizer() -> Any:
        return load_tokenizer(lineage.working, base)

    if not lineage.is_adapter:
        yield Candidate(_digest_after(ready), lambda: _laid_over(lineage, ready.artifact, placement), tokenizer)
        return
    with tempfile.TemporaryDirectory(prefix="neuronledger-candidate-") as place:
        directory = Path(place)
        _link_other_files(lineage.working, directory)
        change = Change(artifact=ready.artifact, side="new", applied_after=(*lineage.applied, ready.artifact))
        files = LineageFiles(lineage.working, lineage.locations["subject"].path, change, lineage.recorded)
        digest = compose_in(directory, files)
        yield Candidate(digest, lambda: placement.load(directory, base), tokenizer)


def _digest_after(ready: PreparedPatch) -> str:
    recorded = ready.plan.lineage.recorded
    digests = {name: content.digest for name, content in ready.expected.items()}
    tensors = [replace(tensor, digest=digests.get(name, tensor.digest)) for name, tensor in recorded.tensors.items()]
    return digest_of(tensors, recorded.files)


def _laid_over(lineage: LineageState, artifact_path: Path, placement: Placement) -> nn.Module:
    model = placement.load(lineage.working)
    with open_artifact(artifact_path) as artifact, torch.no_grad():
        for module in artifact.modules:
            _lay_over(model, artifact, module)
    return model


def _lay_over(model: nn.Module, artifact: PatchArtifact, module: ArtifactModule) -> None:
    """Put an artifact's new rows of one module in the place of its old ones, which have to be there.

    Raises:
        UnsupportedModelError: the module's weight is not in memory, or has another shape than in its file.
        WeightsChangedError: the rows that are there are not the artifact's old ones.
    """
    weight = cast("Tensor", linear_module(model, module.name).weight)
    if weight.is_meta:
        raise UnsupportedModelError(
            f"The weight of {module.name} is offloaded, so that the patch cannot be judged in memory",
            "Judge where all of the model fits on the devices, leave the device map out, or set a policy whose gates "
            "measure nothing",
        )
    stored = weight.T if module.transposed else weight
    if stored.shape[1] != module.width:
        raise UnsupportedModelError(
            f"The loaded weight of {module.name} has rows of {stored.shape[1]} entries, its file of {module.width}",
            "Use a version of transformers that loads this family's linear modules as they are stored",
        )
    rows = artifact.rows(module.name)
    height = max(1, BLOCK_BYTES // (module.width * weight.element_size()))
    for first in range(0, module.rows, height):
        some = rows[first : first + height].to(weight.device)
        last = first + len(some)
        old = artifact.values(module.name, "old", first, last).to(weight.device, weight.dtype)
        if not torch.equal(stored[some], old):
            raise WeightsChangedError(
                f"rows of {module.name} are not in the loaded head what the patch was computed from",
                "something else writes to the working checkpoint; run neuronledger audit verify --weights",
            )
        stored[some] = artifact.values(module.name, "new", first, last).to(weight.device, weight.dtype)


def _link_other_files(working: Path, directory: Path) -> None:
    """What lies beside an adapter's own two files, such as its tokenizer, by symbolic link."""
    for entry in working.iterdir():
        if entry.is_file() and entry.name not in {ADAPTER_WEIGHTS, ADAPTER_CONFIG}:
            (directory / entry.name).symlink_to(entry.resolve())
