"""The weight files of a lineage at a set of applied patches, worked out from the subject and the artifacts alone.

Nothing here reads the working checkpoint, so what is worked out can be held against it. A full checkpoint is the
subject's files with the artifacts' rows in place, taken block by block; an adapter is composed, and small.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from algorithms.checkpoints import Checkpoint, StoredTensor
from governance.adapter_files import ComposedAdapter, compose_adapter, config_bytes, tensor_specs, with_extension
from governance.errors import InputError
from governance.found_files import Layout, layout_of
from governance.patch_artifact import ArtifactModule, PatchArtifact
from governance.row_comparison import Bytes, Owners
from governance.row_files import Block, fits, splice
from governance.tensor_file import header_bytes, tensor_bytes


@dataclass(frozen=True)
class Edit:
    """What one patch writes into one tensor of a full checkpoint."""

    patch: int
    artifact: PatchArtifact
    module: ArtifactModule


def checkpoint_edits(artifacts: Mapping[int, PatchArtifact]) -> dict[str, tuple[Edit, ...]]:
    """Tensor name → what patches write into it, in the order in which the artifacts are given."""
    edits: dict[str, tuple[Edit, ...]] = {}
    for patch, artifact in artifacts.items():
        for module in artifact.modules:
            edits[module.tensor] = (*edits.get(module.tensor, ()), Edit(patch, artifact, module))
    return edits


def write_edits(block: Block, edits: Iterable[Edit]) -> None:
    """Put the rows that patches wrote into a block."""
    for edit in edits:
        splice(block, edit.artifact, edit.module, "new", edit.artifact.rows(edit.module.name))


@dataclass(frozen=True)
class AdapterHead:
    """An adapter at a set of applied patches.

    Attributes:
        composed: its content.
        layout: how its weight file lies.
        config: the bytes of adapter_config.json.
        appended: tensor name of a lora_A → for each of its rows the patch that appended it, 0 for the subject's.
    """

    composed: ComposedAdapter
    layout: Layout
    config: bytes
    appended: Mapping[str, Owners]

    @property
    def contents(self) -> dict[str, bytes]:
        """Files other than the weight file that are not simply the subject's."""
        return {ADAPTER_CONFIG: self.config}

    def rows(self, tensor: str) -> Bytes:
        """The bytes of a tensor, (rows, bytes of a row)."""
        return row_bytes(self.composed.tensors[tensor])


def adapter_head(subject: Adapter, artifacts: Mapping[int, PatchArtifact]) -> AdapterHead:
    """Compose the adapter that patches (number → artifact, in sequence order) lead to."""
    composed = compose_adapter(subject, tuple(artifacts.values()))
    return AdapterHead(
        composed=composed,
        layout=_layout(composed, subject),
        config=config_bytes(composed, subject),
        appended={
            module.a_tensor: _appended(composed.tensors[module.a_tensor], module.rank, name, artifacts)
            for name, module in subject.modules.items()
        },
    )


def require_fit(subject: Checkpoint | Adapter, artifact: PatchArtifact, patch: int) -> None:
    """Refuse an artifact that was made for another subject.

    Raises:
        InputError: it is of the other form, or names a module, shape, dtype or row that the subject does not have.
    """
    form = "adapter" if isinstance(subject, Adapter) else "checkpoint"
    fits = artifact.header.form == form and all(_fits(subject, artifact, module) for module in artifact.modules)
    if not fits:
        raise InputError(
            f"the artifact of patch {patch} was not made for the subject {subject.path}",
            "restore the registry and the artifact store from a copy",
        )


def row_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a tensor in memory, (rows, bytes of a row)."""
    return np.frombuffer(tensor_bytes(tensor), dtype=np.uint8).reshape(tensor.shape[0], -1)


def padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A factor with zeros where an adapter of a larger rank has more rows or columns."""
    rows, columns = shape[0] - tensor.shape[0], shape[1] - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows))


def _layout(composed: ComposedAdapter, subject: Adapter) -> Layout:
    if composed.unchanged:
        return layout_of(subject.path, ADAPTER_WEIGHTS)
    specs = tensor_specs(composed, subject)
    prefix = header_bytes(specs, composed.metadata)
    tensors, position = [], len(prefix)
    for spec in specs:
        end = position + spec.bytes
        tensors.append(StoredTensor(spec.name, spec.dtype, spec.shape, ADAPTER_WEIGHTS, position, end))
        position = end
    return Layout(ADAPTER_WEIGHTS, prefix, composed.metadata, tuple(tensors))


def _appended(A: Tensor, rank: int, module: str, artifacts: Mapping[int, PatchArtifact]) -> Owners:
    """Which patch appended each row of a composed lora_A. Rows of zeros that only make up the rank are the last one's,
    and rows that patches share the first one's."""
    owners: Owners = np.zeros(A.shape[0], dtype=np.int64)
    length, last = rank, 0
    for patch, artifact in artifacts.items():
        if artifact.module(module) is None:
            continue
        grown, _ = with_extension(A[:length], artifact.blocks(module))
        if len(grown) > length:
            owners[length : len(grown)] = patch
            length, last = len(grown), patch
    owners[length:] = last
    return owners


def _fits(subject: Checkpoint | Adapter, artifact: PatchArtifact, module: ArtifactModule) -> bool:
    if not fits(subject.tensors.get(module.tensor), artifact, module):
        return False
    if isinstance(subject, Checkpoint):
        return not module.extension
    lora = subject.modules.get(module.name)
    if lora is None or lora.b_tensor != module.tensor or module.transposed:
        return False
    return subject.tensors[lora.a_tensor].shape[1] == module.in_features
