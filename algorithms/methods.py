"""The two methods in one table: the settings, presets and stored identifications of each, found by its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from algorithms.editors import Selection, Settings
from algorithms.errors import SettingsError
from algorithms.identifications import StoredIdentification
from algorithms.layers import LayerScore
from algorithms.nlsr_identifications import StoredNlsrIdentification
from algorithms.nlsr_settings import NLSR_PRESETS, nlsr_settings
from algorithms.settings import PRESETS, fgsn_settings

MethodName = Literal["fgsn", "nlsr"]


class FoundModule(Protocol):
    """What an identification of either method says of one module."""

    @property
    def module(self) -> str: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def ranks(self) -> Tensor: ...
    @property
    def selected(self) -> Tensor: ...
    @property
    def benign_overlap(self) -> Tensor: ...
    @property
    def already_protected(self) -> Tensor: ...


class Found(Protocol):
    """What an identification of either method found, ready to be recorded."""

    @property
    def modules(self) -> Sequence[FoundModule]: ...
    @property
    def layer_scores(self) -> tuple[LayerScore, ...]: ...
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that safetensors can store."""

    def summary(self) -> dict[str, Any]:
        """Everything that is no tensor, ready for JSON."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: its name in prose.
        presets: named settings.
        choose: settings of a preset with some fields replaced.
        stored: opens a stored identification from its summary and tensors.
    """

    title: str
    presets: Mapping[str, Settings]
    choose: Callable[[str, Mapping[str, Any]], Settings]
    stored: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Selection]


METHODS: Mapping[MethodName, Method] = {
    "fgsn": Method("FGSN", PRESETS, fgsn_settings, StoredIdentification),
    "nlsr": Method("NLSR", NLSR_PRESETS, nlsr_settings, StoredNlsrIdentification),
}


def method_of(name: str) -> Method:
    """The method of that name.

    Raises:
        SettingsError: there is none.
    """
    for known, method in METHODS.items():
        if known == name:
            return method
    raise SettingsError(f"there is no method {name!r}", f"Use one of {', '.join(METHODS)}")


def draws_at_random(settings: Mapping[str, Any]) -> bool:
    """Whether recorded settings of either method draw neurons at random, as a control does."""
    return "random" in (settings.get("score"), settings.get("region_score"))
