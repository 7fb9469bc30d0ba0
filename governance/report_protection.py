"""What the report shows of protection: which neurons are protected, module by module, and how dimensions overlap."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, case, func, select
from sqlalchemy.orm import Session

from registry import claims, queries
from registry.schema import (
    Disposition,
    Identification,
    IdentifiedNeuron,
    Lineage,
    Patch,
    ProtectedDirection,
    ProtectedNeuron,
)


@dataclass(frozen=True)
class ProtectedPart:
    """How many neurons of one module kind in one block a dimension's applied patches protect."""

    dimension: str
    neurons: int
    share: float


@dataclass(frozen=True)
class MapCell:
    """One module kind of one block; `neurons` is 0 where the block has no such module.

    Attributes:
        shared: protected neurons that an identification for another dimension selected as well.
    """

    kind: str
    neurons: int
    protected: int
    parts: tuple[ProtectedPart, ...]
    shared: int = 0

    @property
    def left(self) -> int:
        """Neurons that a later patch may still claim."""
        return self.neurons - self.protected

    @property
    def share(self) -> float:
        """Share of its neurons that are protected."""
        return self.protected / self.neurons if self.neurons else 0.0


@dataclass(frozen=True)
class ProtectionMap:
    """Blocks × module kinds.

    Attributes:
        dimensions: those with protected neurons, in the order of their first patch.
        scale: the share that a full cell stands for.
    """

    kinds: tuple[str, ...]
    blocks: tuple[tuple[int, tuple[MapCell, ...]], ...]
    dimensions: tuple[str, ...]
    protected: int
    neurons: int
    scale: float

    @property
    def left(self) -> int:
        """Neurons that a later patch may still claim."""
        return self.neurons - self.protected

    @property
    def shared(self) -> int:
        """Protected neurons that an identification for another dimension selected as well."""
        return sum(cell.shared for _, cells in self.blocks for cell in cells)

    @property
    def by_dimension(self) -> tuple[tuple[str, int], ...]:
        """How many neurons each dimension's patches protect."""
        counts = dict.fromkeys(self.dimensions, 0)
        for _, cells in self.blocks:
            for part in (part for cell in cells for part in cell.parts):
                counts[part.dimension] += part.neurons
        return tuple(counts.items())

    def left_in(self, kind: str) -> int:
        """Neurons that a later patch may still claim in the modules of one kind."""
        return sum(cell.left for _, cells in self.blocks for cell in cells if cell.kind == kind)


@dataclass(frozen=True)
class Overlap:
    """What one identification selected, and how much of it was protected already, by which dimension's patches."""

    identification: int
    dimension: str
    patches: tuple[str, ...]
    selected: int
    protected: int
    by_dimension: tuple[int, ...]
    benign_overlap: int

    @property
    def free(self) -> int:
        """Selected neurons that no patch had protected."""
        return self.selected - self.protected


@dataclass(frozen=True)
class OverlapTable:
    """Overlaps of every identification, in order; `dimensions` heads `Overlap.by_dimension`."""

    dimensions: tuple[str, ...]
    rows: tuple[Overlap, ...]


@dataclass(frozen=True)
class DirectionClaim:
    """Input directions that one patch protects: in how many modules, and how many directions altogether."""

    patch: int
    dimension: str
    modules: int
    directions: int


_SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def protection_map(session: Session, lineage: Lineage) -> ProtectionMap:
    """Count the protected neurons of every module kind in every block, by dimension."""
    patches = {patch.id: patch for patch in queries.list_patches(session, lineage.id)}
    counts: dict[tuple[int, str], dict[str, int]] = {}
    modules = queries.modules(session, lineage.subject_id)
    place = {module.id: (module.block, module.kind) for module in modules}
    claimed = set()
    for (module_id, patch_id), count in claims.claim_counts(session, lineage.id).items():
        dimension = patches[patch_id].dimension.name
        claimed.add(dimension)
        held = counts.setdefault(place[module_id], {})
        held[dimension] = held.get(dimension, 0) + count
    order = tuple(name for name in dict.fromkeys(patch.dimension.name for patch in patches.values()) if name in claimed)
    sizes: dict[tuple[int, str], int] = {}
    for module in modules:
        sizes[module.block, module.kind] = sizes.get((module.block, module.kind), 0) + module.out_features
    kinds = tuple(dict.fromkeys(module.kind for module in modules))
    shared: dict[tuple[int, str], int] = {}
    for module_id, count in _selected_for_another_too(session, lineage).items():
        shared[place[module_id]] = shared.get(place[module_id], 0) + count

    def cell(block: int, kind: str) -> MapCell:
        at = (block, kind)
        return _cell(kind, sizes.get(at, 0), counts.get(at, {}), order, shared.get(at, 0))

    blocks = tuple(
        (block, tuple(cell(block, kind) for kind in kinds)) for block in sorted({module.block for module in modules})
    )
    largest = max((held.share for _, cells in blocks for held in cells), default=0.0)
    return ProtectionMap(
        kinds=kinds,
        blocks=blocks,
        dimensions=order,
        protected=sum(held.protected for _, cells in blocks for held in cells),
        neurons=sum(sizes.values()),
        scale=next((scale for scale in _SCALES if largest <= scale), 1.0),
    )


def _selected_for_another_too(session: Session, lineage: Lineage) -> dict[int, int]:
    """Module id → how many of its protected neurons an identification for another dimension selected as well."""
    found = (
        select(ProtectedNeuron.module_id, ProtectedNeuron.neuron)
        .join(Patch, Patch.id == ProtectedNeuron.patch_id)
        .join(
            IdentifiedNeuron,
            and_(
                IdentifiedNeuron.module_id == ProtectedNeuron.module_id,
                IdentifiedNeuron.neuron == ProtectedNeuron.neuron,
                IdentifiedNeuron.disposition.in_(("selected", "protected")),
            ),
        )
        .join(Identification, Identification.id == IdentifiedNeuron.identification_id)
        .where(
            ProtectedNeuron.lineage_id == lineage.id,
            Identification.lineage_id == lineage.id,
            Identification.dimension_id != Patch.dimension_id,
        )
        .distinct()
        .subquery()
    )
    query = select(found.c.module_id, func.count()).group_by(found.c.module_id)
    return {row[0]: row[1] for row in session.execute(query)}


def overlap_table(session: Session, lineage: Lineage) -> OverlapTable:
    """Count, for every identification, the selected neurons that were protected already, by dimension."""
    patches = queries.list_patches(session, lineage.id)
    dimension_of: dict[int | None, str] = {patch.id: patch.dimension.name for patch in patches}
    free: dict[int, int] = {}
    benign: dict[int, int] = {}
    held: dict[int, dict[str, int]] = {}
    # Two questions, since grouping all neurons by disposition sorts them: they run to millions.
    for identification, selected, overlapping in _dispositions(session, lineage):
        free[identification], benign[identification] = selected, overlapping
    for identification, holder, count in _holders(session, lineage):
        by = held.setdefault(identification, {})
        name = dimension_of.get(holder, "a patch not recorded")
        by[name] = by.get(name, 0) + count
    holders = {name for by in held.values() for name in by}
    order = (*(name for name in dict.fromkeys(dimension_of.values()) if name in holders),)
    order += tuple(sorted(holders - set(order)))
    found = session.scalars(
        select(Identification).where(Identification.lineage_id == lineage.id).order_by(Identification.id)
    )
    rows = []
    for record in found:
        by = held.get(record.id, {})
        protected = sum(by.values())
        rows.append(
            Overlap(
                identification=record.id,
                dimension=record.dimension.name,
                patches=tuple(f"patch {patch.sequence}" for patch in patches if patch.identification_id == record.id),
                selected=free.get(record.id, 0) + protected,
                protected=protected,
                by_dimension=tuple(by.get(name, 0) for name in order),
                benign_overlap=benign.get(record.id, 0),
            )
        )
    return OverlapTable(order, tuple(rows))


def _dispositions(session: Session, lineage: Lineage) -> Iterator[tuple[int, int, int]]:
    """Identification, neurons that it selected and nobody held, and benign ones."""

    def counted(disposition: Disposition) -> ColumnElement[int]:
        return func.sum(case((IdentifiedNeuron.disposition == disposition, 1), else_=0))

    query = (
        select(IdentifiedNeuron.identification_id, counted("selected"), counted("benign-overlap"))
        .where(_identified_in(lineage))
        .group_by(IdentifiedNeuron.identification_id)
    )
    for identification, selected, benign in session.execute(query):
        yield identification, int(selected), int(benign)


def _holders(session: Session, lineage: Lineage) -> Iterator[tuple[int, int | None, int]]:
    """Identification, patch, and selected neurons that the patch held."""
    query = (
        select(IdentifiedNeuron.identification_id, IdentifiedNeuron.protected_by, func.count())
        .where(_identified_in(lineage), IdentifiedNeuron.disposition == "protected")
        .group_by(IdentifiedNeuron.identification_id, IdentifiedNeuron.protected_by)
    )
    for identification, holder, count in session.execute(query):
        yield identification, holder, int(count)


def _identified_in(lineage: Lineage) -> ColumnElement[bool]:
    runs = select(Identification.id).where(Identification.lineage_id == lineage.id)
    return IdentifiedNeuron.identification_id.in_(runs)


def direction_claims(session: Session, lineage: Lineage) -> tuple[DirectionClaim, ...]:
    """The protected input directions of a lineage, patch by patch."""
    patches = {patch.id: patch for patch in queries.list_patches(session, lineage.id)}
    query = (
        select(ProtectedDirection.patch_id, func.count(), func.sum(ProtectedDirection.rank))
        .where(ProtectedDirection.lineage_id == lineage.id)
        .group_by(ProtectedDirection.patch_id)
        .order_by(ProtectedDirection.patch_id)
    )
    return tuple(
        DirectionClaim(patches[patch_id].sequence, patches[patch_id].dimension.name, modules, int(directions))
        for patch_id, modules, directions in session.execute(query)
    )


def _cell(kind: str, neurons: int, counts: dict[str, int], order: tuple[str, ...], shared: int) -> MapCell:
    parts = tuple(
        ProtectedPart(name, counts[name], counts[name] / neurons) for name in order if counts.get(name) and neurons
    )
    return MapCell(kind, neurons, sum(part.neurons for part in parts), parts, shared)
