"""Which neurons are chosen, given their scores: pure functions without model or disk.

Ties fall to the earlier module and the lower row, so that equal scores always give equal selections.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.settings import FgsnSettings

_BUCKETS = 2**16


@dataclass(frozen=True)
class ScoredModule:
    """Scores of the neurons of one module.

    Attributes:
        scores: (out,) the score of the harmful ranking.
        benign_scores: (out,) the same kind of score on benign prompts, or None.
        row_parameters: entries in one row.
        protected: (n,) rows that applied patches claim, or None; they stay in the ranking.
    """

    scores: Tensor
    benign_scores: Tensor | None
    row_parameters: int
    protected: Tensor | None = None


@dataclass(frozen=True)
class ModuleSelection:
    """Rows chosen in one module; see `ModuleIdentification` for the fields."""

    ranks: Tensor
    selected: Tensor
    benign_overlap: Tensor
    overlap: float | None
    rank_correlation: float | None


@dataclass(frozen=True)
class Selection:
    """Rows chosen in every module, and how far harmful and benign ranking agree over all of them."""

    modules: tuple[ModuleSelection, ...]
    overlap: float | None
    rank_correlation: float | None


def select(
    modules: Sequence[ScoredModule], settings: FgsnSettings, linear_parameters: int, lost: float | None = None
) -> Selection:
    """Choose neurons by the settings' selection and ranking.

    `difference`: the harmful_share of neurons with the highest score, less the benign_share with the highest benign
    score. `budget`: by rank while the selected rows hold at most `budget` of `linear_parameters`; with ranking
    `module` each module gives the same share of its rows. With `stop_at` the taking ends earlier where the gains of
    the rows that no patch claims yet, score times entries, come to that multiple of `lost`. For attribution, damage and
    update-norm a neuron that scores 0 or less carries none of the harm, and is never chosen. Where directions are
    protected every row is taken.

    Args:
        modules: the modules in scope, in order.
        settings: score, selection, ranking and the shares.
        linear_parameters: entries of all linear modules of the model, in scope or not.
        lost: by how much the loss that attribution measures is larger in the head than in the aligned model; None where
            it was not measured in both.
    """
    if not modules:
        return Selection((), None, None)
    if settings.protects_directions:
        return Selection(tuple(_every_row(module) for module in modules), None, None)
    pools = [range(len(modules))] if settings.ranking == "all" else [range(i, i + 1) for i in range(len(modules))]
    scope_parameters = sum(len(module.scores) * module.row_parameters for module in modules)
    budget_share = min(1.0, settings.budget * linear_parameters / scope_parameters)
    found: list[ModuleSelection] = []
    for pool in pools:
        found += _select_from_pool([modules[i] for i in pool], settings, budget_share, lost)
    return Selection(tuple(found), _overall_overlap(modules, found), _overall_correlation(modules, settings))


def gaining_directions(gains: Sequence[Tensor], wanted: float | None) -> list[Tensor]:
    """Which candidate directions of each module are taken out: those that gain most, over all modules.

    Only what gains more than 0 is taken, and no more than it needs for the gains to come to `wanted`.

    Args:
        gains: (r,) of each module.
        wanted: what they are to come to; None for everything above 0.

    Returns:
        Masks (r,).
    """
    values = torch.cat(list(gains)).double()
    order = _descending(values)
    order = order[values[order] > 0]
    if wanted is not None:
        order = order[_before(values[order]) < wanted]
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order] = True
    return _split(mask, [len(each) for each in gains])


def new_rows(selected: Tensor, protected: Tensor | None) -> Tensor:
    """Selected rows that no applied patch has claimed: selected \\ protected, (n,) int64 ascending."""
    selected = selected.to(torch.int64).sort().values
    if protected is None or not len(protected):
        return selected
    return selected[~torch.isin(selected, protected.to(torch.int64))]


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's ρ, ties at their mean rank; None when either side is constant."""
    a, b = _mean_ranks(x), _mean_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else None


def entry_threshold(blocks: Callable[[], Iterable[Tensor]], count: int) -> float:
    """The `count`-th largest of the values in all blocks, exactly, in two passes and 1 MiB.

    The bits of float32 numbers ≥ 0 are ordered as the numbers are, so a histogram of their upper half finds the bucket
    and one of the lower half the number.

    Args:
        blocks: gives the same blocks of non-negative float32 values at every call.
        count: from 1 to the number of values.
    """
    upper = torch.zeros(_BUCKETS, dtype=torch.int64)
    for block in blocks():
        upper += torch.bincount(_bits(block) >> 16, minlength=_BUCKETS)
    bucket, above = _bucket_of(upper, count)
    lower = torch.zeros(_BUCKETS, dtype=torch.int64)
    for block in blocks():
        bits = _bits(block)
        lower += torch.bincount(bits[bits >> 16 == bucket] & (_BUCKETS - 1), minlength=_BUCKETS)
    rest, _ = _bucket_of(lower, count - above)
    return float(torch.tensor([(bucket << 16) | rest], dtype=torch.int32).view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    # abs: −0.0 has the sign bit set.
    return values.abs().contiguous().reshape(-1).view(torch.int32).long()


def _bucket_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket that holds the count-th largest value, and how many values lie in higher buckets."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, count))
    position = min(position, len(histogram) - 1)
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, above


def _every_row(module: ScoredModule) -> ModuleSelection:
    rows = torch.arange(len(module.scores))
    return ModuleSelection(rows, rows.clone(), torch.empty(0, dtype=torch.int64), None, None)


def _select_from_pool(
    modules: Sequence[ScoredModule], settings: FgsnSettings, budget_share: float, lost: float | None
) -> list[ModuleSelection]:
    """Selection within modules that are ranked together."""
    sizes = [len(module.scores) for module in modules]
    scores = torch.cat([module.scores for module in modules])
    order = _descending(scores)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    benign_top = _benign_top(modules, settings)
    if settings.selection == "difference":
        top = _top(scores, order, settings.harmful_share, settings)
        dropped = torch.zeros_like(top) if benign_top is None else top & benign_top
        chosen = top & ~dropped
    else:
        top = chosen = _within_budget(modules, scores, order, budget_share, settings)
        if settings.stops_early and lost is not None:
            top = chosen = chosen & _until_gained(modules, scores, order, settings.stop_at * lost)
        dropped = torch.zeros_like(top)
    benign_parts: Sequence[Tensor | None] = [None] * len(modules) if benign_top is None else _split(benign_top, sizes)
    parts = zip(
        modules,
        _split(ranks, sizes),
        _split(chosen, sizes),
        _split(dropped, sizes),
        _split(top, sizes),
        benign_parts,
        strict=True,
    )
    return [
        ModuleSelection(
            ranks=part_ranks.clone(),
            selected=part_chosen.nonzero().reshape(-1),
            benign_overlap=part_dropped.nonzero().reshape(-1),
            overlap=None if part_benign is None else _share(part_top & part_benign, part_top),
            rank_correlation=_correlation(module),
        )
        for module, part_ranks, part_chosen, part_dropped, part_top, part_benign in parts
    ]


def _benign_top(modules: Sequence[ScoredModule], settings: FgsnSettings) -> Tensor | None:
    scores = _benign_scores(modules)
    return None if scores is None else _top(scores, _descending(scores), settings.benign_share, settings)


def _top(scores: Tensor, order: Tensor, share: float, settings: FgsnSettings) -> Tensor:
    """The first round(share · n) of the order as a mask; at least one for a positive share."""
    count = max(1, round(share * len(order))) if share > 0 else 0
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask & _eligible(scores, settings)


def _within_budget(
    modules: Sequence[ScoredModule], scores: Tensor, order: Tensor, share: float, settings: FgsnSettings
) -> Tensor:
    """The longest beginning of the order whose rows hold at most `share` of the modules' parameters, as a mask."""
    parameters = torch.cat(
        [torch.full((len(module.scores),), module.row_parameters, dtype=torch.int64) for module in modules]
    )
    eligible = _eligible(scores, settings)
    order = order[eligible[order]]
    # Half an entry of tolerance: the share itself is a rounded quotient.
    limit = share * int(parameters.sum()) + 0.5
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[parameters[order].cumsum(0) <= limit]] = True
    return mask


def _until_gained(modules: Sequence[ScoredModule], scores: Tensor, order: Tensor, wanted: float) -> Tensor:
    """The shortest beginning of the order whose unclaimed rows gain `wanted`, as a mask; empty for 0 or less."""
    gains = torch.cat([module.scores.double() * module.row_parameters for module in modules]).clamp_min(0)
    gains[torch.cat([_protected(module) for module in modules])] = 0
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[_before(gains[order]) < wanted]] = True
    return mask


def _before(gains: Tensor) -> Tensor:
    """What has been gained before each of some gains in order."""
    return gains.cumsum(0) - gains


def _protected(module: ScoredModule) -> Tensor:
    mask = torch.zeros(len(module.scores), dtype=torch.bool)
    if module.protected is not None:
        mask[module.protected] = True
    return mask


def _eligible(scores: Tensor, settings: FgsnSettings) -> Tensor:
    if settings.score in {"attribution", "damage", "update-norm"}:
        return scores > 0
    return torch.ones(len(scores), dtype=torch.bool)


def _descending(scores: Tensor) -> Tensor:
    return torch.argsort(scores, descending=True, stable=True)


def _benign_scores(modules: Sequence[ScoredModule]) -> Tensor | None:
    found = [module.benign_scores for module in modules if module.benign_scores is not None]
    return torch.cat(found) if len(found) == len(modules) else None


def _share(part: Tensor, whole: Tensor) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else 0.0


def _correlation(module: ScoredModule) -> float | None:
    return None if module.benign_scores is None else rank_correlation(module.scores, module.benign_scores)


def _overall_overlap(modules: Sequence[ScoredModule], found: Sequence[ModuleSelection]) -> float | None:
    if _benign_scores(modules) is None:
        return None
    # The harmful top set is what was selected and what was dropped from it.
    sizes = [len(part.selected) + len(part.benign_overlap) for part in found]
    shared = sum(size * (part.overlap or 0.0) for size, part in zip(sizes, found, strict=True))
    return shared / sum(sizes) if sum(sizes) else 0.0


def _overall_correlation(modules: Sequence[ScoredModule], settings: FgsnSettings) -> float | None:
    benign = _benign_scores(modules)
    if benign is None:
        return None
    if settings.ranking == "all":
        return rank_correlation(torch.cat([module.scores for module in modules]), benign)
    values = [value for value in map(_correlation, modules) if value is not None]
    return sum(values) / len(values) if values else None


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return mean_ranks


def _split(values: Tensor, sizes: list[int]) -> list[Tensor]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]
