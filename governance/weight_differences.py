"""How a difference between weights on disk and what they should be is named: file, tensor, rows, and what is wrong."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal[
    "interrupted",
    "artifact",
    "subject",
    "file",
    "header",
    "tensor",
    "unclaimed",
    "claimed",
    "claim",
    "record",
    "history",
]
"""What differs: a patch that was interrupted, an artifact, the subject itself, a file, a header, a tensor as a whole,
rows that no patch claims, rows that one does, claims and artifacts among each other, recorded digests, those of the
history."""

Unit = Literal["row", "neuron", "element"]
"""What a tensor's differences are counted in: rows as stored, neurons that are stored as columns, or the elements of a
tensor of one dimension."""

Mask = npt.NDArray[np.bool_]

SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        kind: what sort of thing.
        problem: what is wrong with it.
        file: name of the file, relative to the working checkpoint.
        tensor: name of the tensor.
        module: name of the linear module whose weight the tensor is.
        unit: what `rows` counts.
        rows: the first places in the tensor, ascending, at most `SHOWN`.
        count: how many places there are in all.
        patch: number of the patch that has to do with it.
    """

    kind: Kind
    problem: str
    file: str | None = None
    tensor: str | None = None
    module: str | None = None
    unit: Unit | None = None
    rows: tuple[int, ...] = ()
    count: int = 0
    patch: int | None = None

    def __str__(self) -> str:
        """One line that names file, tensor and rows, and says when there are more rows than it lists."""
        where = [part for part in (self.file, self.tensor and f"tensor {self.tensor}") if part]
        if self.count:
            more = f" and {self.count - len(self.rows):,} more" if self.count > len(self.rows) else ""
            plural = "s" if self.count > 1 else ""
            where.append(f"{self.unit}{plural} {', '.join(map(str, self.rows))}{more}")
        return f"{', '.join(where)}: {self.problem}" if where else self.problem


def first_places(mask: Mask) -> tuple[tuple[int, ...], int]:
    """The first places where a mask is set, at most `SHOWN`, and how many there are."""
    places = np.flatnonzero(mask)
    return tuple(places[:SHOWN].tolist()), len(places)
