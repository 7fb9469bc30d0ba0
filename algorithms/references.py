"""The super-aligned reference by extrapolation: W_e = (1+β) W_a − β W_0, as weights that are never all in memory.

It is computed as W_a + β (W_a − W_0), so that a weight that alignment did not move stays as it is, bit for bit. Of an
aligned adapter on W_0 the update s B A grows by 1+β: B is multiplied, A, alpha and rank stay, so the rows of A can be
found again in an adapter that holds them already. Mode `published-code` multiplies both factors by 1.8, as the authors'
code does; the update then grows by 3.24. Source: NLSR 2412.12497, step 1.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.differences import LayeredWeights, same_checkpoint
from algorithms.errors import MismatchError, SettingsError
from algorithms.nlsr_settings import NlsrSettings
from algorithms.weights import LoraFactors, WeightSource

_MERGE = "Merge the aligned adapter into a full checkpoint and name that as the aligned model"


def extrapolate(aligned: Tensor, base: Tensor, beta: float) -> Tensor:
    """W_a + β (W_a − W_0), in the dtype of the arguments; where both are equal it is W_a exactly."""
    return aligned + beta * (aligned - base)


def extrapolated_factors(factors: LoraFactors, settings: NlsrSettings) -> LoraFactors:
    """Factors of the reference's update from those of the aligned model's, at the same scale."""
    if settings.mode == "published-code":
        return LoraFactors(factors.A * settings.published_factor, factors.B * settings.published_factor, factors.scale)
    return LoraFactors(factors.A, factors.B * (1 + settings.beta), factors.scale)


class ExtrapolatedWeights:
    """The reference of an aligned full checkpoint: rows of both models are read when asked for.

    Args:
        aligned: W_a.
        base: W_0, with the same modules.
        beta: β.
    """

    def __init__(self, aligned: WeightSource, base: WeightSource, beta: float) -> None:
        self._aligned, self._base, self._beta = aligned, base, beta

    @property
    def path(self) -> Path:
        """Says what it was made from; no such directory exists."""
        return _path_of_view(self._aligned)

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        """Linear modules of the aligned model by name, ordered by block."""
        return self._aligned.modules

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Rows of the reference's effective weight, float32 (n, in)."""
        return extrapolate(self._aligned.rows(module, index), self._base.rows(module, index), self._beta)

    def factors(self, module: str) -> LoraFactors | None:
        """None: it is a full model."""
        del module
        return None


class ExtrapolatedAdapter:
    """The reference of an aligned adapter on W_0: the same checkpoint below, a larger update.

    Args:
        aligned: the aligned adapter.
        base: the checkpoint under it.
        settings: beta, mode and published_factor.
    """

    def __init__(self, aligned: WeightSource, base: WeightSource, settings: NlsrSettings) -> None:
        self.base = base
        self._aligned, self._settings = aligned, settings

    @property
    def path(self) -> Path:
        """Says what it was made from; no such directory exists."""
        return _path_of_view(self._aligned)

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        """Linear modules of the checkpoint by name, ordered by block."""
        return self.base.modules

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Rows of the reference's effective weight, float32 (n, in)."""
        rows = self.base.rows(module, index)
        factors = self.factors(module)
        return rows if factors is None else torch.addmm(rows, factors.B[index], factors.A, alpha=factors.scale)

    def factors(self, module: str) -> LoraFactors | None:
        """Factors of the reference's update; None for a module without adapter."""
        factors = self._aligned.factors(module)
        return None if factors is None else extrapolated_factors(factors, self._settings)


def reference_weights(aligned: WeightSource, base: WeightSource, settings: NlsrSettings) -> WeightSource:
    """The reference that extrapolation gives, without a file; the aligned model itself at β = 0.

    Args:
        aligned: W_a, a full checkpoint or an adapter.
        base: W_0. For an aligned adapter the checkpoint under it.
        settings: beta, mode and published_factor.

    Raises:
        MismatchError: the models do not have the same modules, or the base is not what the aligned adapter lies on.
        SettingsError: mode published-code for a full checkpoint, which has no factors.
    """
    require_extrapolable(aligned, base, settings)
    if is_aligned_itself(settings):
        return aligned
    if isinstance(aligned, LayeredWeights):
        return ExtrapolatedAdapter(aligned, aligned.base, settings)
    return ExtrapolatedWeights(aligned, base, settings.beta)


def require_extrapolable(aligned: WeightSource, base: WeightSource, settings: NlsrSettings) -> None:
    """Refuse a pair that the reference cannot be computed from.

    Raises:
        MismatchError, SettingsError: as `reference_weights`.
    """
    for one, other in ((aligned, base), (base, aligned)):
        for name, module in one.modules.items():
            twin = other.modules.get(name)
            if twin is None or (twin.out_features, twin.in_features) != (module.out_features, module.in_features):
                raise MismatchError(
                    f"{other.path} has no module {name} of shape {module.out_features} × {module.in_features}, as "
                    f"{one.path} has",
                    "Name the base model that the aligned one was made from",
                )
    if is_aligned_itself(settings):
        return
    if isinstance(aligned, LayeredWeights):
        if isinstance(base, LayeredWeights) or not same_checkpoint(aligned, base):
            raise MismatchError(
                f"{base.path} is not the checkpoint under the aligned adapter {aligned.path}, so the reference is no "
                "multiple of its update",
                f"Name the adapter's own checkpoint as the base. {_MERGE}, if that base is meant",
            )
    elif settings.mode == "published-code":
        raise SettingsError(
            f"mode published-code multiplies LoRA factors, and the aligned model {aligned.path} is a full checkpoint",
            "Use mode = exact",
        )


def is_aligned_itself(settings: NlsrSettings) -> bool:
    """Whether the reference is the aligned model: β = 0 in mode exact. The base is then not read for it."""
    return settings.mode == "exact" and settings.beta == 0


def _path_of_view(aligned: WeightSource) -> Path:
    # Not the aligned model's own path: two sources of one path are taken to hold the same weights.
    return aligned.path.with_name(f"{aligned.path.name} (extrapolated)")
