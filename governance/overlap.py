"""Dimensions beside each other: which neurons of one are also another's, by selection and by protection.

The report shows the same by identification: what each found protected when it ran (`report_protection.overlap_table`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, String, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from governance.report_protection import overlap_table
from governance.workspace import Workspace
from registry import queries
from registry.schema import Identification, IdentifiedNeuron, Lineage, ProtectedNeuron, SafetyDimension

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
                    held_by_other=_common(neurons, held.get(other, _union([]))),
                    found_protected=found.get((dimension, other), 0),
                    share=both / len(neurons) if len(neurons) else 0.0,
                )
            )
    return rows


def _selected(session: Session, lineage: Lineage) -> dict[str, Neurons]:
    """Dimension → neurons that its identifications selected, in the order of the first identifications."""
    named = (
        select(Identification.id, SafetyDimension.name)
        .join(SafetyDimension, SafetyDimension.id == Identification.dimension_id)
        .where(Identification.lineage_id == lineage.id)
        .order_by(Identification.id)
    )
    names = {run.id: run.name for run in session.execute(named)}
    neurons = IdentifiedNeuron
    runs = neurons.identification_id.in_(select(Identification.id).where(Identification.lineage_id == lineage.id))
    where = (runs, neurons.disposition != "benign-overlap")
    return _gathered(session, names, neurons.identification_id, neurons.module_id, neurons.neuron, where)


def _held(session: Session, lineage: Lineage) -> dict[str, Neurons]:
    """Dimension → neurons that its applied patches protect."""
    names = {patch.id: patch.dimension.name for patch in queries.list_patches(session, lineage.id)}
    neurons = ProtectedNeuron
    where = (neurons.lineage_id == lineage.id,)
    return _gathered(session, names, neurons.patch_id, neurons.module_id, neurons.neuron, where)


def _gathered(
    session: Session,
    names: Mapping[int, str],
    owner: InstrumentedAttribute[int],
    module: InstrumentedAttribute[int],
    neuron: InstrumentedAttribute[int],
    where: Sequence[ColumnElement[bool]],
) -> dict[str, Neurons]:
    """Name of the owner → its neurons. The database gathers them: they run to millions."""
    gathered = func.aggregate_strings(cast(neuron, String), ",")
    pieces: dict[str, list[Neurons]] = {name: [] for name in names.values()}
    for number, module_id, numbers in session.execute(
        select(owner, module, gathered).where(*where).group_by(owner, module)
    ):
        pieces[names[number]].append((module_id << 32) + np.fromstring(numbers, dtype=np.int64, sep=","))
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
    """All of them, ascending and once. Sorting takes a fraction of what `numpy.unique` takes to hash a million."""
    every: Neurons = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
    once: Neurons = every[np.diff(every, prepend=-1) != 0]
    return once
