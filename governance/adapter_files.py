"""The files of a patched LoRA adapter, composed from the subject's adapter and the applied patches.

What an adapter is at a head depends on nothing but the subject and its applied patches in sequence: lora_A is
[A_t ; E₁ ; E₂ …] with each extension once, lora_B the subject's rows with zeros under the extensions, and claimed rows
are those of the last patch that wrote them. So applying, reverting and recovering are one computation, and with no
patch left it is the subject, byte for byte. An adapter is small: its file is written whole and renamed.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, LoraModule
from algorithms.checkpoints import read_stored
from algorithms.safetensors_files import read_header
from governance.patch_artifact import PatchArtifact
from governance.tensor_file import TensorFileWriter, TensorSpec
from registry.files import replace_file, sync_directory


@dataclass(frozen=True)
class ComposedAdapter:
    """The content of an adapter's two files.

    Attributes:
        tensors: every tensor by name, in the dtype of the subject's adapter.
        config: content of adapter_config.json.
        metadata: `__metadata__` of the subject's file.
        unchanged: no patch is applied, so the files are copies of the subject's.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    unchanged: bool


def compose_adapter(subject: Adapter, artifacts: Sequence[PatchArtifact]) -> ComposedAdapter:
    """Compute the adapter at the head that `artifacts`, in sequence order, lead to."""
    tensors = {name: read_stored(subject.path, stored) for name, stored in _in_file_order(subject)}
    metadata = read_header(subject.path / ADAPTER_WEIGHTS).metadata or {}
    config: dict[str, Any] = json.loads((subject.path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rslora = bool(config.get("use_rslora"))
    grown: dict[str, tuple[int, float]] = {}
    for name, lora in subject.modules.items():
        touching = [artifact for artifact in artifacts if artifact.module(name) is not None]
        if not touching:
            continue
        A, B = _compose_module(tensors[lora.a_tensor], tensors[lora.b_tensor], name, touching)
        if A.shape[0] != lora.rank:
            grown[name] = rank_and_alpha(lora, A.shape[0], rslora=rslora)
            more = grown[name][0] - A.shape[0]
            A, B = torch.nn.functional.pad(A, (0, 0, 0, more)), torch.nn.functional.pad(B, (0, more))
        tensors[lora.a_tensor], tensors[lora.b_tensor] = A, B
    if grown:
        config = _with_ranks(config, subject, grown)
    return ComposedAdapter(tensors, config, metadata, unchanged=not artifacts)


def write_adapter(composed: ComposedAdapter, subject: Adapter, working: Path) -> None:
    """Write an adapter's files whole: temporary file, flush, rename.

    Raises:
        OSError: a file cannot be written; the files that were there are still there.
    """
    weights = ADAPTER_WEIGHTS
    if composed.unchanged:
        _replace(working / weights, (subject.path / weights).read_bytes())
        _replace(working / ADAPTER_CONFIG, (subject.path / ADAPTER_CONFIG).read_bytes())
        return
    temporary = _temporary(working / weights)
    temporary.unlink(missing_ok=True)
    with TensorFileWriter(temporary, tensor_specs(composed, subject), composed.metadata) as writer:
        for name, tensor in composed.tensors.items():
            writer.put(name, tensor)
    temporary.chmod((working / weights).stat().st_mode if (working / weights).exists() else 0o644)
    temporary.replace(working / weights)
    sync_directory(working)
    _replace(working / ADAPTER_CONFIG, config_bytes(composed, subject))


def rewrite_file(path: Path) -> None:
    """Write a file of an adapter again as it reads, so that it is on the disk.

    Raises:
        OSError: it cannot be read or written.
    """
    _replace(path, path.read_bytes())


def remove_unfinished(working: Path) -> None:
    """Remove temporary files that an interrupted write left beside the adapter."""
    left = [path for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if (path := _temporary(working / name)).exists()]
    for path in left:
        path.unlink()
    if left:  # else a power cut could bring them back after nothing is left to recover
        sync_directory(working)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def config_bytes(composed: ComposedAdapter, subject: Adapter) -> bytes:
    """Return adapter_config.json as it is written: the subject's own bytes while no rank has grown."""
    original = (subject.path / ADAPTER_CONFIG).read_bytes()
    if json.loads(original) == composed.config:
        return original
    return (json.dumps(composed.config, indent=2) + "\n").encode()


def tensor_specs(composed: ComposedAdapter, subject: Adapter) -> list[TensorSpec]:
    """Return the tensors of a composed weight file in the order in which they are written."""
    return [
        TensorSpec(name, subject.tensors[name].dtype, tuple(tensor.shape)) for name, tensor in composed.tensors.items()
    ]


def _in_file_order(subject: Adapter) -> list[tuple[str, Any]]:
    return sorted(subject.tensors.items(), key=lambda item: item[1].begin)


def _compose_module(A: Tensor, B: Tensor, name: str, artifacts: Sequence[PatchArtifact]) -> tuple[Tensor, Tensor]:
    rank = A.shape[0]
    columns: list[Tensor] = []
    for artifact in artifacts:
        A, placed = with_extension(A, artifact.blocks(name))
        columns.append(torch.cat([torch.arange(rank), *placed]))
    wide = torch.zeros(B.shape[0], A.shape[0], dtype=B.dtype)
    wide[:, :rank] = B
    for place, artifact in zip(columns, artifacts, strict=True):
        rows = artifact.rows(name)
        wide[rows] = 0  # what patches before it wrote there
        wide[rows.unsqueeze(1), place] = artifact.values(name, "new")
    return A.contiguous(), wide


def with_extension(A: Tensor, blocks: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Append the parts of a patch's extension that A does not hold yet.

    Returns:
        A, and where the rows of each part of the extension stand in it.
    """
    placed = []
    for block in blocks:
        position = find_rows(A, block)
        if position is None:
            position = A.shape[0]
            A = torch.cat([A, block])
        placed.append(torch.arange(position, position + len(block)))
    return A, placed


def find_rows(A: Tensor, sought: Tensor) -> int | None:
    """Return where `sought` stands in A as consecutive rows, so that patches share an extension."""
    for start in range(A.shape[0] - sought.shape[0] + 1):
        if torch.equal(A[start : start + sought.shape[0]], sought):
            return start
    return None


def _with_ranks(config: dict[str, Any], subject: Adapter, grown: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Name every module in full with its rank, and with the alpha that keeps its scale.

    In PEFT the first matching pattern wins, and it sorts patterns when it saves; full names alone cannot be shadowed.
    They are not escaped, because older versions of PEFT look a name up as it stands where no pattern matches.
    """
    chosen = {name: grown.get(name, (lora.rank, lora.alpha)) for name, lora in subject.modules.items()}
    return {
        **config,
        "rank_pattern": {name: rank for name, (rank, _) in chosen.items()},
        "alpha_pattern": {name: alpha for name, (_, alpha) in chosen.items()},
    }


def rank_and_alpha(lora: LoraModule, least: int, *, rslora: bool) -> tuple[int, float]:
    """Return the smallest rank from `least` on with an alpha that gives the very same scale in PEFT's arithmetic.

    Not every scale is a quotient by every rank: 6/√3, say, is no float divided by √6. The surplus ranks hold zeros. The
    search ends at the latest where the rank is the adapter's own times a power of four: alpha and divisor are then both
    multiplied by a power of two.
    """
    for rank in itertools.count(least):
        divisor = math.sqrt(rank) if rslora else rank
        alpha = lora.scale * divisor
        exact = lora.alpha * (math.sqrt(rank / lora.rank) if rslora else rank / lora.rank)
        around = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
        for candidate in (round(alpha), exact, *around):
            if candidate / divisor == lora.scale:
                return rank, candidate
    raise AssertionError("unreachable")


def _replace(path: Path, content: bytes) -> None:
    replace_file(path, content, _temporary(path))
