"""What the selected rows of a module become: restore, project, complement or subspace.

Every operation is one formula on *coordinates* of the rows. Of a full checkpoint they are the `in` entries of a row.
Of a LoRA subject they are the entries of a row of lora_B over the basis [A_t ; E]; E are rows that lora_A has to gain,
often none. With t_i the subject's row, a_i the aligned model's, u = t − a and C = V Vᵀ/N, c the strength:

    restore     t_i − c u_i                    (c = 1: a_i)
    project     t_i − c u_i + c (C u)_i        (c = 1: a_i + (C u)_i)
    complement  t_i − c (C u)_i
    subspace    t_i − c (U_i Q) Qᵀ             (LoRA: Qᵀ joins the basis, with coordinates −c u_i [A_t ; E] Q)
    project, target full:  (1 − c) W_i + c (C W)_i

C mixes rows, so it acts on coordinates as it does on effective rows. The forms for c = 1 are written apart because
they are then exact: restored rows are the aligned model's, bit for bit. Sources: FGSN 2508.09190 step 3 for project;
the others are decisions told in docs/fgsn.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.coordinates import LoraCoordinates, row_coordinates
from algorithms.differences import BLOCK_BYTES, STREAM_BYTES, Difference, require_finite_values
from algorithms.errors import MismatchError, SettingsError
from algorithms.projection import ProjectedMatrix, SafetyProjection
from algorithms.selection import entry_threshold
from algorithms.settings import FgsnSettings
from algorithms.weights import WeightSource


@dataclass(frozen=True)
class ModuleStatistics:
    """What operations need of a module's calibration inputs.

    Attributes:
        input_norms: (in,) float32 norms ‖x_j‖; for `entries`.
        directions: Q, (in, r) float32 with orthonormal columns; for `subspace`.
    """

    input_norms: Tensor | None = None
    directions: Tensor | None = None


@dataclass(frozen=True)
class RowEdit:
    """New values of rows of one module.

    Attributes:
        rows: (n,) int64 rows of the module.
        before: float32 values that the rows have in the subject; (n, in), or (n, r) rows of lora_B of a LoRA subject.
        values: float32; (n, in) effective rows of a full checkpoint, or (n, r + e) rows of lora_B of a LoRA subject.
        extension: (e, in) float32 rows to append to lora_A; rows of lora_B that are not in `rows` get e zeros there.
            None when the basis stays (e = 0) and for full checkpoints.
    """

    rows: Tensor
    before: Tensor
    values: Tensor
    extension: Tensor | None


def edit_rows(
    subject: WeightSource,
    aligned: WeightSource,
    base: WeightSource,
    module: str,
    rows: Tensor,
    settings: FgsnSettings,
    statistics: ModuleStatistics | None = None,
) -> RowEdit:
    """All selected rows of a module at once; `RowEditor` gives them block by block.

    Args and Raises: as `RowEditor`.
    """
    editor = RowEditor(subject, aligned, base, module, rows, settings, statistics)
    edits = list(editor.edits())
    before, values = (torch.cat(parts) for parts in ([e.before for e in edits], [e.values for e in edits]))
    return RowEdit(editor.row_index, before, values, editor.extension)


class RowEditor:
    """Computes the new values of selected rows of one module, a block of rows at a time.

    Args:
        subject: the model whose rows are edited: the subject as it was registered, or the head. Rows that no patch
            claims are the same in both, but `project` and `complement` mix in the other rows as they are here, and
            coordinates and `extension` are over this model's lora_A.
        aligned: W_a. For a LoRA subject the checkpoint under its adapter, or an adapter on that checkpoint.
        base: W_0; read by `project` and `complement` only.
        module: canonical name of the module.
        rows: (n,) int64 rows to edit, without repetition; sorted on the way in.
        settings: operation, strength, normalization and so on.
        statistics: norms for `entries`, directions for `subspace`; else not read.

    Attributes:
        row_index: (n,) int64, ascending.
        extension: what `RowEdit.extension` of every edit is.

    Raises:
        MismatchError: a row outside the module, or a LoRA subject whose aligned model shares no basis with it.
        SettingsError: the operation cannot be applied to a LoRA subject, or needs statistics that were not given.
        NonFiniteError: NaN or infinity in what is read or computed.
    """

    def __init__(
        self,
        subject: WeightSource,
        aligned: WeightSource,
        base: WeightSource,
        module: str,
        rows: Tensor,
        settings: FgsnSettings,
        statistics: ModuleStatistics | None = None,
    ) -> None:
        self.module = subject.modules[module]
        self.row_index = _checked_rows(rows, self.module)
        self._settings = settings
        self._statistics = statistics or ModuleStatistics()
        self._coordinates = row_coordinates(subject, aligned, self.module)
        if isinstance(self._coordinates, LoraCoordinates):
            _require_low_rank(settings)
        self._aligned, self._base = aligned, base
        self._directions = self._required_directions()
        self.extension = self._extension()
        self._entries = self._least_entry_damage()

    def edits(self) -> Iterator[RowEdit]:
        """The edits of all rows in ascending order; one empty edit when there are no rows.

        What the projection keeps in memory is there from the first edit to the last, and not before or after.
        """
        projection = self._projection()
        if projection is None:
            for index in self._blocks(STREAM_BYTES):
                yield self._edit(index, None)
            return
        # V and M are streamed once for each of these blocks, so they are larger than what is worked on afterwards.
        for wide in self._blocks(BLOCK_BYTES):
            projected = projection.rows(wide)
            height = self._height(STREAM_BYTES)
            for start in range(0, max(1, len(wide)), height):
                yield self._edit(wide[start : start + height], projected[start : start + height])
            del projected  # the next block needs the room

    def _projection(self) -> ProjectedMatrix | None:
        settings = self._settings
        if not settings.projects:
            return None
        V = Difference(self._aligned, self._base, self.module.name)
        C = SafetyProjection(V, settings.normalization, settings.energy)
        source = self._coordinates.subject_rows if settings.target == "full" else self._coordinates.update_rows
        return C.of(source, self._coordinates.width)

    def _height(self, size: int) -> int:
        return max(1, size // (4 * self.module.in_features))

    def _blocks(self, size: int) -> Iterator[Tensor]:
        for start in range(0, max(1, len(self.row_index)), self._height(size)):
            yield self.row_index[start : start + self._height(size)]

    def _edit(self, index: Tensor, projected: Tensor | None) -> RowEdit:
        t = self._coordinates.subject_rows(index)
        before = t[:, : self._coordinates.own_width]
        values = before.clone() if self._settings.strength == 0 else self._new_values(t, index, projected)
        require_finite_values(values, self.module.name, "The computed edit")
        return RowEdit(index, before, values, self.extension)

    def _new_values(self, t: Tensor, index: Tensor, projected: Tensor | None) -> Tensor:
        new = self._recombined(t, index, projected) if self._directions is None else self._without_directions(t, index)
        if self._entries is None:
            return new
        damage = self._entry_damage(index)
        return torch.where((damage >= self._entries) & (damage > 0), new, t)

    def _recombined(self, t: Tensor, index: Tensor, projected: Tensor | None) -> Tensor:
        """restore, project and complement: the rows' own coordinates are mixed anew."""
        settings, c = self._settings, self._settings.strength
        if projected is not None and settings.target == "full":
            return (1 - c) * t + c * projected
        if settings.operation == "complement" and projected is not None:
            return _minus(t, c * projected)
        a = self._coordinates.aligned_rows(index)
        kept = a if c == 1 else _minus(t, c * (t - a))
        return kept if projected is None else _minus(kept, -c * projected)

    def _without_directions(self, t: Tensor, index: Tensor) -> Tensor:
        """subspace: U_i loses what it does to the directions Q."""
        Q = self._directions
        if Q is None:
            return t
        aligned = self._coordinates.aligned_rows(index)
        update = torch.sub(t, aligned, out=aligned)
        removed = self._settings.strength * (update @ self._coordinates.onto(Q))
        if isinstance(self._coordinates, LoraCoordinates):
            return torch.cat([t[:, : self._coordinates.own_width], -removed], dim=1)
        return _minus(t, torch.mm(removed, Q.T, out=update))

    def _required_directions(self) -> Tensor | None:
        if self._settings.operation != "subspace" or self._settings.strength == 0:
            return None
        Q = self._statistics.directions
        if Q is None:
            raise SettingsError(
                f"operation subspace needs input directions of {self.module.name}, which this identification lacks",
                "Identify again with operation = subspace",
            )
        return require_finite_values(Q.float(), self.module.name, "The direction basis")

    def _extension(self) -> Tensor | None:
        if self._settings.strength == 0 or not isinstance(self._coordinates, LoraCoordinates):
            return None
        if self._directions is not None:
            return self._directions.T.contiguous() if self._directions.shape[1] else None
        return self._coordinates.extension

    def _least_entry_damage(self) -> float | None:
        """Damage of the last entry that may still change; entries that tie with it change too."""
        share = self._settings.entries
        if share is None or self._settings.strength == 0 or not len(self.row_index):
            return None
        if self._statistics.input_norms is None:
            raise SettingsError(
                f"entries = {share} needs input norms of {self.module.name}, which this identification lacks",
                "Identify again with entries set",
            )
        count = max(1, round(share * len(self.row_index) * self.module.in_features))
        blocks = self._blocks
        return entry_threshold(lambda: (self._entry_damage(index) for index in blocks(STREAM_BYTES)), count)

    def _entry_damage(self, index: Tensor) -> Tensor:
        norms = self._statistics.input_norms
        damage = self._coordinates.update_rows(index).abs()
        return damage if norms is None else damage * norms.float()


def _require_low_rank(settings: FgsnSettings) -> None:
    """Refuse what a LoRA adapter cannot hold."""
    if settings.target == "full":
        raise SettingsError(
            "target full projects whole weights, which a LoRA adapter cannot hold",
            "Use target = update, or merge the adapter into a full checkpoint",
        )
    if settings.entries is not None:
        raise SettingsError(
            f"entries = {settings.entries} asks for a sparse change, which is not low-rank",
            "Leave entries out, or merge the adapter into a full checkpoint",
        )


def _minus(values: Tensor, removed: Tensor) -> Tensor:
    """values − removed, put in the place of `removed`; where that is zero, `values` bit for bit: −0.0 − −0.0 is 0.0."""
    return torch.sub(values, removed.add_(0.0), out=removed)  # −0.0 + 0.0 is 0.0, and −0.0 − 0.0 is −0.0


def _checked_rows(rows: Tensor, module: LinearModule) -> Tensor:
    index = rows.to(torch.int64).reshape(-1).sort().values
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= module.out_features):
        wrong = int(index[0]) if int(index[0]) < 0 else int(index[-1])
        raise MismatchError(
            f"{module.name} has no row {wrong}: it has {module.out_features} neurons",
            "Identify again on this model",
        )
    if bool((index[1:] == index[:-1]).any()):
        repeated = int(index[1:][index[1:] == index[:-1]][0])
        raise MismatchError(f"Row {repeated} of {module.name} is named twice", "Name every row once")
    return index
