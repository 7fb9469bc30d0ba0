"""Whether rows act on claimed directions as the patch that claimed these left them, within the rounding of files.

Rows are compared in the coordinates of their file: of a full checkpoint the rows themselves, of an adapter rows of
lora_B over rows of lora_A. The checkpoint under an adapter does not change, so what the adapter adds is compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.weights import AdapterWeights, CheckpointWeights
from governance.adapter_files import find_rows
from governance.lineage_state import LineageState
from governance.patch_artifact import ArtifactModule, PatchArtifact
from governance.row_figures import differing_rows
from governance.tensor_file import DTYPES

_BLOCK_ENTRIES = 4 * 2**20
_LEAST_PRECISION = 1e-6  # rows are computed in float32, in a few operations
_ORTHOGONAL = 1e-4


@dataclass(frozen=True)
class Rows:
    """Rows of one module in the coordinates of a file.

    Attributes:
        values: (n, w) as the file holds them.
        basis: (w, in) float32, scaled; None where the coordinates are the entries.
    """

    values: Tensor
    basis: Tensor | None

    def action(self, directions: Tensor) -> Tensor:
        """W_i Q, float64 (n, m), of the rows on directions (in, m)."""
        onto = directions.double() if self.basis is None else self.basis.double() @ directions.double()
        onto_rows: Tensor = self.values.double() @ onto
        return onto_rows

    def rounding(self) -> Tensor:
        """How much rounding a row in the file's dtype may move it along a direction, float64 (n,)."""
        finfo = torch.finfo(self.values.dtype)
        precision = max(finfo.eps, _LEAST_PRECISION)
        entries = self.values.double().abs() * precision + finfo.smallest_normal * finfo.eps
        lengths = None if self.basis is None else torch.linalg.vector_norm(self.basis.double(), dim=1)
        bound: Tensor = torch.linalg.vector_norm(entries, dim=1) if lengths is None else entries @ lengths
        return bound


def moved(now: Rows, then: Rows, directions: Tensor, writes: int) -> Tensor:
    """Which rows (n,) bool act on directions otherwise than they did, by more than `writes` roundings explain."""
    change = torch.linalg.vector_norm(now.action(directions) - then.action(directions), dim=1)
    more: Tensor = change > max(1, writes) * (now.rounding() + then.rounding())
    return more


def artifact_blocks(
    artifact: PatchArtifact, module: ArtifactModule, lora: tuple[Tensor, float] | None
) -> Iterator[tuple[Tensor, Rows, Rows]]:
    """Row numbers, old rows and new rows of a module of an artifact, block by block.

    Args:
        artifact: the artifact.
        module: one of its modules.
        lora: lora_A of the subject and its scale; None for a full checkpoint.
    """
    rows = artifact.rows(module.name)
    old_basis = new_basis = None
    if lora is not None:
        A, scale = lora
        extension = artifact.extension(module.name)
        new_basis = scale * (A if extension is None else torch.cat([A, extension.float()]))
        old_basis = new_basis[: module.width + module.held]
    height = max(1, _BLOCK_ENTRIES // module.in_features)
    for first in range(0, module.rows, height):
        last = min(first + height, module.rows)
        old, new = (artifact.values(module.name, side, first, last) for side in ("old", "new"))
        yield rows[first:last], Rows(old, old_basis), Rows(new, new_basis)


def head_rows(head: CheckpointWeights | AdapterWeights, module: ArtifactModule, rows: Tensor) -> Rows:
    """Rows of a working checkpoint as its file holds them."""
    dtype = DTYPES[module.dtype]
    # Rows are read as float32, which holds every stored dtype exactly.
    if isinstance(head, AdapterWeights):
        A, B, scale = head.adapter.factors(module.name)
        return Rows(B[rows].to(dtype), scale * A)
    return Rows(head.rows(module.name, rows).to(dtype), None)


def unlike_head(
    lineage: LineageState, artifact: PatchArtifact, module: ArtifactModule, rows: Tensor, old: Tensor
) -> Tensor:
    """Which of some old rows (n, width + held) of an artifact are not the head's, bit for bit; bool (n,)."""
    own = head_rows(lineage.head, module, rows).values
    if isinstance(lineage.head, AdapterWeights):
        A = lineage.head.adapter.factors(module.name)[0]
        held, start = [torch.arange(module.width)], 0
        for block in artifact.blocks(module.name):
            if start < module.held:
                place = find_rows(A, block.float())
                if place is None:
                    return torch.ones(len(rows), dtype=torch.bool)
                held.append(torch.arange(place, place + len(block)))
                start += len(block)
        columns = torch.cat(held)
        others = own.index_fill(1, columns, 0)
        own = own[:, columns].contiguous()
        return differing_rows(old, own) | (others != 0).any(dim=1)
    return differing_rows(old, own)


def lora_of(subject: CheckpointWeights | AdapterWeights, module: str) -> tuple[Tensor, float] | None:
    """lora_A and scale of a module; None for a full checkpoint."""
    if not isinstance(subject, AdapterWeights):
        return None
    A, _, scale = subject.adapter.factors(module)
    return A, scale


@dataclass(frozen=True)
class CheckedActions:
    """How rows act on the directions that patches claim.

    Attributes:
        directions: how many directions were looked at.
        moved: number of the patch, module, and how many of the rows that it wrote act otherwise now.
    """

    directions: int
    moved: tuple[tuple[int, str, int], ...]


def check_actions(
    subject: CheckpointWeights | AdapterWeights,
    head: CheckpointWeights | AdapterWeights,
    applied: Mapping[int, PatchArtifact],
) -> CheckedActions:
    """Compare how the head acts on every claimed direction with how the claiming patch left it, row by row.

    Args:
        subject, head: the subject, and the working checkpoint.
        applied: number → artifact of every applied patch, in sequence order.

    Raises:
        CheckpointError, AdapterError: a file cannot be read.
    """
    directions = 0
    found: list[tuple[int, str, int]] = []
    for sequence, artifact in applied.items():
        for module in artifact.modules:
            claimed = artifact.directions(module.name)
            if claimed is None:
                continue
            directions += claimed.shape[1]
            later = sum(
                number > sequence and other.module(module.name) is not None for number, other in applied.items()
            )
            count = 0
            for rows, _, then in artifact_blocks(artifact, module, lora_of(subject, module.name)):
                count += int(moved(head_rows(head, module, rows), then, claimed, later).sum())
            if count:
                found.append((sequence, module.name, count))
    return CheckedActions(directions, tuple(found))


def first_conflict(lineage: LineageState, artifact: PatchArtifact) -> str | None:
    """What an artifact made elsewhere would change on the directions that a lineage's patches claim; None if nothing.

    Raises:
        ArtifactError: the artifact of a claiming patch cannot be read.
    """
    for module in artifact.modules:
        claimed = lineage.directions.union(module.name)
        if claimed is None:
            continue
        holders = _named([claim.sequence for claim in lineage.directions.held[module.name]])
        new = artifact.directions(module.name)
        if new is not None and float((claimed.T @ new).abs().max()) > _ORTHOGONAL:
            return f"its directions of {module.name} are not orthogonal to those that {holders} claims"
        for _, old, values in artifact_blocks(artifact, module, lora_of(lineage.subject, module.name)):
            if bool(moved(values, old, claimed, 1).any()):
                return f"its rows of {module.name} act otherwise on the directions that {holders} claims"
    return None


def _named(sequences: Sequence[int]) -> str:
    return f"patch {sequences[0]}" if len(sequences) == 1 else f"one of patches {', '.join(map(str, sequences))}"
