"""SafeLoRA, as a baseline: whole modules are projected where projection turns their update the most.

Per module V = W_a − W_0 and C = V Vᵀ/‖V‖_F; where cos(C ΔW, ΔW) is low, ΔW ← C ΔW (for an adapter B ← C B, A
unchanged). Source: 2405.16833, equations 2 and 3, and its published code, which does not bound the operator's norm.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from algorithms.coordinates import row_coordinates
from algorithms.differences import BLOCK_BYTES, Difference, LayeredWeights, require_finite_values
from algorithms.errors import SettingsError
from algorithms.operations import RowEdit
from algorithms.projection import SafetyProjection
from algorithms.weights import WeightSource, row_blocks


@dataclass(frozen=True)
class SafeLoraModule:
    """One module's verdict.

    Attributes:
        module: canonical name.
        cosine: cos(C ΔW, ΔW); 1 for a module without update, 0 where C = 0.
        projected: whether its update is to be replaced by C ΔW.
    """

    module: str
    cosine: float
    projected: bool


def safelora_modules(
    subject: WeightSource,
    aligned: WeightSource,
    base: WeightSource,
    *,
    threshold: float | None = None,
    number: int | None = None,
) -> tuple[SafeLoraModule, ...]:
    """Which modules SafeLoRA projects: those with a cosine of at most `threshold`, or the `number` lowest.

    A LoRA subject's modules without adapter are left out. Ties at the `number`-th fall to the earlier module.

    Raises:
        SettingsError: not exactly one of `threshold` and `number` is given.
        MismatchError, NonFiniteError: as `RowEditor`.
    """
    if (threshold is None) == (number is None):
        raise SettingsError("SafeLoRA chooses by a threshold or by a number of modules", "Give exactly one of the two")
    names = [
        name for name in subject.modules if not isinstance(subject, LayeredWeights) or subject.factors(name) is not None
    ]
    cosines = {name: safelora_cosine(subject, aligned, base, name) for name in names}
    if number is not None:
        chosen = set(sorted(names, key=lambda name: cosines[name])[:number])
    else:
        chosen = {name for name in names if threshold is not None and cosines[name] <= threshold}
    return tuple(SafeLoraModule(name, cosines[name], name in chosen) for name in names)


def safelora_cosine(subject: WeightSource, aligned: WeightSource, base: WeightSource, module: str) -> float:
    """cos(C ΔW, ΔW) with ΔW = W_t − W_a; factored throughout when the subject is an adapter."""
    coordinates = row_coordinates(subject, aligned, subject.modules[module])
    C = SafetyProjection(Difference(aligned, base, module), "fro", clamp=False)
    projected = C.of(coordinates.update_rows, coordinates.width)
    across = own = image = 0.0
    for block in row_blocks(subject.modules[module], BLOCK_BYTES):
        u = coordinates.update_rows(block)
        after = projected.rows(torch.arange(block.start, block.stop))
        across += coordinates.inner(after, u)
        own += coordinates.inner(u, u)
        image += coordinates.inner(after, after)
    if own <= 0.0:
        return 1.0
    return across / (own * image) ** 0.5 if image > 0.0 else 0.0


def safelora_edits(subject: WeightSource, aligned: WeightSource, base: WeightSource, module: str) -> Iterator[RowEdit]:
    """New values of every row of a projected module, block by block: a + C u in the subject's coordinates."""
    linear = subject.modules[module]
    coordinates = row_coordinates(subject, aligned, linear)
    C = SafetyProjection(Difference(aligned, base, module), "fro", clamp=False)
    projected = C.of(coordinates.update_rows, coordinates.width)
    for block in row_blocks(linear, BLOCK_BYTES):
        index = torch.arange(block.start, block.stop)
        before = coordinates.subject_rows(index)[:, : coordinates.own_width]
        values = coordinates.aligned_rows(index) + projected.rows(index)
        require_finite_values(values, module, "The computed edit")
        yield RowEdit(index, before, values, coordinates.extension)
