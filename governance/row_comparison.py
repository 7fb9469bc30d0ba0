"""Rows of one tensor as they are found, beside the subject's and beside what the applied patches make of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from algorithms.safetensors_files import StoredTensor
from governance.weight_differences import Difference, Kind, Mask, Unit, first_places

Bytes = npt.NDArray[np.uint8]
Owners = npt.NDArray[np.int64]
"""For every row of a tensor the number of a patch, or 0."""


@dataclass(frozen=True)
class Claims:
    """What the registry and the artifacts say of a tensor's rows.

    Attributes:
        owners: the applied patch that claims a row.
        holders: the applied patch whose artifact holds a row.
        pending: the interrupted patch whose artifact holds a row.
    """

    owners: Owners
    holders: Owners
    pending: Owners

    @classmethod
    def none(cls, rows: int) -> "Claims":
        """No claims on a tensor of so many rows."""
        return cls(*(np.zeros(rows, dtype=np.int64) for _ in range(3)))


@dataclass(frozen=True)
class RowCounts:
    """How one patch's rows of one tensor fared."""

    rows: int
    changed: int
    unchanged: int
    as_written: int
    unread: int


class RowComparison:
    """Compares one tensor, block by block.

    A row is one of dimension 0 of the stored tensor; of a module that is stored transposed it is a column, a neuron.

    Args:
        stored: the tensor as it should lie in its file.
        module: the linear module whose weight it is, if any.
        transposed: whether rows are columns.
    """

    def __init__(self, stored: StoredTensor, module: str | None, *, transposed: bool) -> None:
        self._stored, self._module, self._transposed = stored, module, transposed
        self.length = rows_of(stored, transposed=transposed)
        self.changed: Mask = np.zeros(self.length, dtype=np.bool_)
        self.wrong: Mask = np.zeros(self.length, dtype=np.bool_)
        self._complete = 0

    @property
    def seen(self) -> Mask:
        """Rows that were found whole."""
        if self._transposed:
            return np.full(self.length, self._complete == self._stored.shape[0])
        return np.arange(self.length) < self._complete

    def compare_with_subject(self, start: int, found: Bytes, before: Bytes) -> None:
        """Compare storage rows from `start` on with the subject's.

        Args:
            start: the first storage row.
            found: their bytes, one after the other; fewer than `before` has where the file ends early.
            before: the subject's, (rows, bytes of a row).
        """
        self._mark(self.changed, start, found, before)

    def compare_with_head(self, start: int, found: Bytes, after: Bytes) -> None:
        """Compare the same storage rows with what they should be."""
        self._mark(self.wrong, start, found, after)

    def count_as_changed(self, first: int) -> None:
        """Count rows from `first` on as changed: the subject has no such rows."""
        self.changed[first:] = True

    def counts(self, owners: Owners, patch: int) -> RowCounts:
        """How the rows of one patch fared."""
        own, seen = owners == patch, self.seen
        return RowCounts(
            rows=int(own.sum()),
            changed=int((own & seen & self.changed).sum()),
            unchanged=int((own & seen & ~self.changed).sum()),
            as_written=int((own & seen & ~self.wrong).sum()),
            unread=int((own & ~seen).sum()),
        )

    def differences(
        self, claims: Claims, unfinished: Mapping[int, str], unreadable: frozenset[int]
    ) -> Iterator[Difference]:
        """Everything that the claims do not explain.

        Args:
            claims: who claims which row.
            unfinished: number → state of the interrupted patches.
            unreadable: applied patches whose artifacts cannot be read, so that their rows cannot be checked.
        """
        free = self.seen & self.changed & (claims.owners == 0)
        for patch, state in unfinished.items():
            problem = f"changed by patch {patch}, which is {state}: run neuronledger recover"
            yield from self._difference("interrupted", free & (claims.pending == patch), problem, patch)
        unclaimed = free & ~np.isin(claims.pending, list(unfinished))
        yield from self._difference("unclaimed", unclaimed, "changed, and claimed by no applied patch")
        for patch in _numbers(claims.owners):
            if patch in unreadable:
                continue
            own = claims.owners == patch
            problem = f"claimed by patch {patch}, but not the bytes that it wrote"
            yield from self._difference("claimed", self.seen & self.wrong & own, problem, patch)
            problem = f"claimed by patch {patch}, but not in its artifact"
            yield from self._difference("claim", own & (claims.holders != patch), problem, patch)
        for patch in _numbers(claims.holders):
            problem = f"in the artifact of patch {patch}, but not claimed by it"
            yield from self._difference("claim", (claims.holders == patch) & (claims.owners != patch), problem, patch)

    def head_differences(self, problem: str) -> Iterator[Difference]:
        """Rows that are not what they should be, and rows that were not found."""
        yield from self._difference("tensor", self.seen & self.wrong, problem)
        yield from self.missing()

    def missing(self) -> Iterator[Difference]:
        """Rows that were not found because the file ends before them."""
        yield from self._difference("file", ~self.seen, "missing: the file ends before")

    def _difference(self, kind: Kind, mask: Mask, problem: str, patch: int | None = None) -> Iterator[Difference]:
        if mask.any():
            rows, count = first_places(mask)
            stored = self._stored
            yield Difference(kind, problem, stored.file, stored.name, self._module, self._unit, rows, count, patch)

    @property
    def _unit(self) -> Unit:
        if self._transposed:
            return "neuron"
        return "row" if len(self._stored.shape) > 1 else "element"

    def _mark(self, mask: Mask, start: int, found: Bytes, expected: Bytes) -> None:
        width = expected.shape[1]
        height = len(found) // width
        self._complete = max(self._complete, start + height)
        differs = found[: height * width].reshape(height, width) != expected[:height]
        if self._transposed:
            mask |= differs.reshape(height, self.length, width // self.length).any(axis=(0, 2))
        else:
            mask[start : start + height] |= differs.any(axis=1)


def rows_of(stored: StoredTensor, *, transposed: bool) -> int:
    """How many rows a tensor has: columns of one that is stored transposed, and one of a tensor without dimension."""
    if not stored.shape:
        return 1
    return stored.shape[1] if transposed else stored.shape[0]


def _numbers(owners: Owners) -> list[int]:
    return [number for number in np.unique(owners).tolist() if number]
