"""Which modules are patched: those whose region fine-tuning has turned away from the reference.

S_j is the cosine, in the Frobenius inner product, of reference and subject inside the region of module j. Modules are
ranked by it, the lowest first; module j is left alone (γ_j = 1) with probability

    P_j = P_L − ε + 2 ε (rank_j − 1) / (N − 1)

so a module that is less like the reference is patched more often. Every module's draw comes from the seed and its own
name: a module more or less does not change the draws of the others. Source: NLSR 2412.12497, step 3; the paper prints
P_L + δ r_j / N and does not say what δ is. `published-code` ranks the other way round, as the authors' code does.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.differences import BLOCK_BYTES
from algorithms.low_rank import Matrix
from algorithms.nlsr_settings import NlsrSettings
from algorithms.regions import FactorMasks
from algorithms.weights import LoraFactors

_DRAW_BITS = 53


@dataclass(frozen=True)
class ModuleChoice:
    """One module's verdict.

    Attributes:
        module: canonical name.
        similarity: S_j, from −1 to 1.
        rank: its place by similarity from 1, the lowest first; modules of equal similarity share their mean place.
        kept_probability: P_j, the probability of being left alone; 0 or 1 where nothing is drawn.
        draw: the module's number in [0, 1); it is left alone when that lies below P_j. None where nothing is drawn.
        patched: γ_j = 0.
    """

    module: str
    similarity: float
    rank: float
    kept_probability: float
    draw: float | None
    patched: bool


def choose_modules(similarities: Mapping[str, float], settings: NlsrSettings) -> tuple[ModuleChoice, ...]:
    """The verdict on every module, in the order given.

    Args:
        similarities: S_j by module name.
        settings: selection with its probabilities or threshold, and the seed.
    """
    ranks = _ranks(similarities)
    found = []
    for module, similarity in similarities.items():
        kept = _kept_probability(similarity, ranks[module], len(similarities), settings)
        drawn = settings.selection in {"bernoulli", "published-code"}
        draw = module_draw(module, settings.seed) if drawn else None
        patched = kept == 0.0 if draw is None else draw >= kept
        found.append(ModuleChoice(module, similarity, ranks[module], kept, draw, patched))
    return tuple(found)


def module_draw(module: str, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the module's name alone."""
    digest = hashlib.sha256(f"{seed}:nlsr-module:{module}".encode()).digest()
    return math.ldexp(int.from_bytes(digest[:8], "big") >> (64 - _DRAW_BITS), -_DRAW_BITS)


def row_similarity(reference: Matrix, subject: Matrix, rows: Tensor) -> float:
    """cos_F of the selected rows of two matrices.

    Args:
        reference: the reference's update over the base, or its weight.
        subject: the same of the fine-tuned model.
        rows: (n,) int64 rows of the region.
    """
    height = max(1, BLOCK_BYTES // (4 * reference.module.in_features))
    products = [0.0, 0.0, 0.0]
    for start in range(0, len(rows), height):
        index = rows[start : start + height]
        e, t = reference.rows(index).double(), subject.rows(index).double()
        for place, (x, y) in enumerate(((e, t), (e, e), (t, t))):
            products[place] += float((x * y).sum())
    return _cosine(*products)


def factor_similarity(reference: LoraFactors, subject: LoraFactors, masks: FactorMasks) -> float:
    """cos_F of the products of the masked factors, (M_B⊙B)(M_A⊙A); from r × r matrices."""
    masked = [
        (torch.where(masks.A, factors.A, 0.0).double(), torch.where(masks.B, factors.B, 0.0).double())
        for factors in (reference, subject)
    ]
    (of_a, of_b), (other_a, other_b) = masked
    return _cosine(
        _inner(of_a, of_b, other_a, other_b), _inner(of_a, of_b, of_a, of_b), _inner(other_a, other_b, other_a, other_b)
    )


def _inner(A: Tensor, B: Tensor, other_a: Tensor, other_b: Tensor) -> float:
    """⟨B A, B' A'⟩_F = Σ (Bᵀ B') ⊙ (A A'ᵀ)."""
    return float(((B.T @ other_b) * (A @ other_a.T)).sum())


def _cosine(across: float, own: float, other: float) -> float:
    """Two zeros are alike (1); a zero and anything else have nothing in common (0)."""
    if own <= 0.0 or other <= 0.0:
        return 1.0 if own <= 0.0 and other <= 0.0 else 0.0
    return min(1.0, max(-1.0, across / (math.sqrt(own) * math.sqrt(other))))


def _ranks(similarities: Mapping[str, float]) -> dict[str, float]:
    ordered = sorted(similarities.values())
    places: dict[float, tuple[int, int]] = {}
    for place, similarity in enumerate(ordered, start=1):
        first, _ = places.get(similarity, (place, place))
        places[similarity] = (first, place)
    return {module: sum(places[similarity]) / 2 for module, similarity in similarities.items()}


def _kept_probability(similarity: float, rank: float, count: int, settings: NlsrSettings) -> float:
    if settings.selection == "all":
        return 0.0
    if settings.selection == "threshold":
        return 0.0 if settings.threshold is not None and similarity < settings.threshold else 1.0
    if count == 1:
        return settings.kept_probability
    place = (rank - 1) / (count - 1)
    if settings.selection == "published-code":
        place = 1 - place
    return settings.kept_probability - settings.epsilon + 2 * settings.epsilon * place


def patched_modules(choices: Iterable[ModuleChoice]) -> tuple[str, ...]:
    """Names of the modules that are patched, in order."""
    return tuple(choice.module for choice in choices if choice.patched)
