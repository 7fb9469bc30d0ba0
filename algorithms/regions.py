"""The safety-critical region of a module: its neurons, or the entries of its LoRA factors, that matter most for safety.

As published, entries of each factor are ranked by their size after the rank reduction (`low_rank`), over the whole
factor or in each row. The neuron form ranks rows of the reduced effective update by their norm, so that a region is a
set of neurons. `magnitude`, `wanda` and `random` are the alternatives that a claim about regions has to be held
against. Source: NLSR 2412.12497, step 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.errors import CalibrationError
from algorithms.low_rank import LowRank, Matrix, kept_rank, largest_rank, reduced_factors, row_norms
from algorithms.nlsr_settings import NlsrSettings
from algorithms.scores import random_scores
from algorithms.weights import LoraFactors


@dataclass(frozen=True)
class RegionStatistics:
    """What the ranking needs of a module's calibration inputs.

    Attributes:
        moment: mean of (R x)(R x)ᵀ for an update L R (R is lora_A), or of x xᵀ for a dense one; for `low-rank`, and
            for `wanda` over factors.
        input_norms: (in,) norms ‖x_j‖; for `wanda`.
    """

    moment: Tensor | None = None
    input_norms: Tensor | None = None


@dataclass(frozen=True)
class FactorMasks:
    """The region in both LoRA factors, True inside: A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor


def neuron_scores(matrix: Matrix, statistics: RegionStatistics, settings: NlsrSettings) -> Tensor:
    """What the neurons of a module are ranked by; (out,) float32, never negative.

    Args:
        matrix: the reference's update over the base, or its whole weight.
        statistics: of the matrix's module.
        settings: region_score with its rank rule, or the seed of a random draw.

    Raises:
        CalibrationError: the statistics that the score needs are missing.
    """
    module = matrix.module
    if settings.region_score == "random":
        return random_scores(module.name, module.out_features, settings.seed, "nlsr-region")
    if settings.region_score == "magnitude":
        return row_norms(matrix)
    if settings.region_score == "wanda":
        norms = _required(statistics.input_norms, module.name).float()
        return torch.cat([rows.abs() @ norms for _, rows in matrix.blocks()])
    moment = _required(statistics.moment, module.name)
    return LowRank(matrix, moment, kept_rank(largest_rank(matrix), settings)).row_norms()


def region_rows(scores: Tensor, sparsity: float) -> Tensor:
    """The neurons inside the region: round((1−P)·out) of the highest score, at least 1; (n,) int64 ascending.

    Ties fall to the lower row.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[: _inside(len(scores), sparsity)].sort().values


def factor_masks(
    factors: LoraFactors, statistics: RegionStatistics, settings: NlsrSettings, module: str
) -> FactorMasks:
    """The region in the entries of both factors of one module.

    Args:
        factors: of the reference.
        statistics: of the module; `moment` is that of A x.
        settings: region_score, sparsity, region_scope, mode.
        module: canonical name, for the random draw and for messages.

    Raises:
        CalibrationError: the statistics that the score needs are missing.
    """
    of_a, of_b = _entry_scores(factors, statistics, settings, module)
    return FactorMasks(entry_mask(of_a, settings), entry_mask(of_b, settings))


def entry_mask(scores: Tensor, settings: NlsrSettings) -> Tensor:
    """The entries of the highest score, over the whole matrix or in every row; bool, of the shape of `scores`.

    In mode exact round((1−P)·n) of n entries, at least 1; ties fall to the earlier entry. In mode published-code the
    entries above the ⌊P·n⌋-th smallest, so that entries equal to it are left out.
    """
    lines = scores.reshape(1, -1) if settings.region_scope == "matrix" else scores
    width = lines.shape[1]
    if settings.mode == "published-code":
        quantile = lines.sort(dim=1).values[:, int(settings.sparsity * width)]
        return (lines > quantile[:, None]).reshape(scores.shape)
    order = torch.argsort(lines, dim=1, descending=True, stable=True)[:, : _inside(width, settings.sparsity)]
    return torch.zeros_like(lines, dtype=torch.bool).scatter_(1, order, value=True).reshape(scores.shape)


def _entry_scores(
    factors: LoraFactors, statistics: RegionStatistics, settings: NlsrSettings, module: str
) -> tuple[Tensor, Tensor]:
    A, B = factors.A, factors.B
    if settings.region_score == "random":
        drawn = [
            random_scores(f"{module}.{name}", factor.numel(), settings.seed, "nlsr-region").reshape(factor.shape)
            for name, factor in (("lora_A", A), ("lora_B", B))
        ]
        return drawn[0], drawn[1]
    if settings.region_score == "magnitude":
        return A.abs(), B.abs()
    moment = _required(statistics.moment, module)
    if settings.region_score == "wanda":
        norms = _required(statistics.input_norms, module).float()
        # The inputs of B are A x; one scale for both sides of a comparison is enough, so means serve as sums do.
        return A.abs() * norms, B.abs() * moment.diagonal().clamp_min(0.0).sqrt().float()
    reduced = reduced_factors(factors, moment, settings)
    return reduced.A.abs(), reduced.B.abs()


def _inside(count: int, sparsity: float) -> int:
    return min(count, max(1, round((1 - sparsity) * count)))


def _required(value: Tensor | None, module: str) -> Tensor:
    if value is None:
        raise CalibrationError(
            f"The region of {module} is ranked by what safe answers do to it, and nothing was measured there",
            "Give safe prompt and answer pairs, or choose region_score magnitude or random",
        )
    return value
