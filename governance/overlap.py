"""Dimensions beside each other: which neurons of one are also another's, by selection and by protection.

The report shows the same by identification: what each found protected when it ran (`report_protection.overlap_table`).
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import String, cast, func, select
from sqlalchemy.orm import Session

from governance.report_protection import overlap_table
from governance.workspace import Workspace
from registry import claims, queries
from registry.schema import Identification, IdentifiedNeuron, Lineage, SafetyDimension

Neurons = NDArray[np.int64]
"""(n,) ascending: module id · 2³² + neuron."""


@dataclass(frozen=True)
class DimensionOverlap:
    """What one dimension's identifications selected, held against another dimension.

    Attributes:
        dimension: whose neurons are looked at.
        other: what they are held against.
        selected: neurons that any identification of `dimension` selected.
        selected_by_both: those of them that any identification of `other` selected too.
        held_by_other: those of them that applied patches of `other` protect now.
        found_protected: how often an identification of `dimension` selected a neuron that a patch of `other` protected
            then, summed over its identifications, as the report has them; such a neuron is left alone.
        share: `selected_by_both` of `selected`.
    """

    dimension: str
    other: str
    selected: int
    selected_by_both: int
    held_by_other: int
    found_protected: int
    share: float


def overlaps(workspace: Workspace, lineage: str) -> list[DimensionOverlap]:
    """Hold every two dimensions that were identified in a lineage against each other, both ways.

    Raises:
        RecordNotFoundError: no lineage of that name.
    """
    with workspace.registry.read() as session:
        record = queries.get_lineage(session, lineage)
        selected, held = _selected(session, record), _held(session, record)
        found = _found_protected(session, record)
    nothing = np.empty(0, dtype=np.int64)
    rows = []
    for dimension, neurons in selected.items():
        for other in selected:
            if other == dimension:
                continue
            both = _common(neurons, selected[other])
            rows.append(
                DimensionOverlap(
                    dimension=dimension,
                    other=other,
                    selected=len(neurons),
                    selected_by_both=both,
                    held_by_other=_common(neurons, held.get(other, nothing)),
                    found_protected=found.get((dimension, other), 0),
                    share=both / len(neurons) if len(neurons) else 0.0,
                )
            )
    return rows


def _selected(session: Session, lineage: Lineage) -> dict[str, Neurons]:
    """Dimension → neurons that its identifications selected, in the order of the first identifications."""
    gathered = func.aggregate_strings(cast(IdentifiedNeuron.neuron, String), ",")
    query = (
        select(IdentifiedNeuron.identification_id, IdentifiedNeuron.module_id, gathered)
        .where(
            IdentifiedNeuron.identification_id.in_(
                select(Identification.id).where(Identification.lineage_id == lineage.id)
            ),
            IdentifiedNeuron.disposition != "benign-overlap",
        )
        .group_by(IdentifiedNeuron.identification_id, IdentifiedNeuron.module_id)
    )
    named = (
        select(Identification.id, SafetyDimension.name)
        .join(SafetyDimension, SafetyDimension.id == Identification.dimension_id)
        .where(Identification.lineage_id == lineage.id)
        .order_by(Identification.id)
    )
    names = {run.id: run.name for run in session.execute(named)}
    pieces: dict[str, list[Neurons]] = {name: [] for name in names.values()}
    for identification, module_id, neurons in session.execute(query):
        pieces[names[identification]].append(_keys(module_id, np.fromstring(neurons, dtype=np.int64, sep=",")))
    return {name: _union(parts) for name, parts in pieces.items()}


def _held(session: Session, lineage: Lineage) -> dict[str, Neurons]:
    """Dimension → neurons that its applied patches protect."""
    dimension_of = {patch.id: patch.dimension.name for patch in queries.list_patches(session, lineage.id)}
    pieces: dict[str, list[Neurons]] = {}
    for claim in claims.claims(session, lineage.id):
        pieces.setdefault(dimension_of[claim.patch_id], []).append(_keys(claim.module_id, _numbers(claim.neurons)))
    return {name: _union(parts) for name, parts in pieces.items()}


def _found_protected(session: Session, lineage: Lineage) -> dict[tuple[str, str], int]:
    """Dimension and holder → selected neurons that were protected, summed over the rows of the report's table."""
    table = overlap_table(session, lineage)
    return _summed(
        ((row.dimension, other), count)
        for row in table.rows
        for other, count in zip(table.dimensions, row.by_dimension, strict=True)
    )


def _summed(counts: Iterable[tuple[tuple[str, str], int]]) -> dict[tuple[str, str], int]:
    total: dict[tuple[str, str], int] = {}
    for key, count in counts:
        total[key] = total.get(key, 0) + count
    return total


def _common(one: Neurons, other: Neurons) -> int:
    return len(np.intersect1d(one, other, assume_unique=True))


def _union(parts: list[Neurons]) -> Neurons:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)


def _keys(module_id: int, neurons: Neurons) -> Neurons:
    return (np.int64(module_id) << 32) + neurons


def _numbers(neurons: "array[int]") -> Neurons:
    return np.frombuffer(neurons, dtype=np.int64)
