"""What an NLSR identification found, and how it is stored: its tensors and a JSON summary of the rest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from algorithms.errors import SettingsError
from algorithms.module_choice import ModuleChoice
from algorithms.nlsr_settings import NlsrSettings
from algorithms.regions import FactorMasks

_MODULE_TENSORS = ("scores", "ranks", "region", "selected", "already_protected")
_FIGURES = ("linear_parameters", "selected_parameters", "counted_tokens")


@dataclass(frozen=True)
class NlsrModule:
    """What was found in one module in scope.

    Attributes:
        module: canonical name of the module.
        input_group: name of the first module with the same input.
        scores: (out,) float32, what the neurons are ranked by.
        ranks: (out,) int64, position in the module's ranking from 0.
        region: (n,) int64 ascending, the neurons inside the region, patched or not; all neurons in form factor.
        selected: (m,) int64 ascending, the region's neurons when the module is patched, those that are already
            protected included; of a module whose region is protected already, the region; else none.
        already_protected: (p,) int64 ascending, the selected rows that were protected when the run began.
        masks: the region in the entries of both factors; form factor only.
    """

    module: str
    input_group: str
    scores: Tensor
    ranks: Tensor
    region: Tensor
    selected: Tensor
    already_protected: Tensor
    masks: FactorMasks | None


@dataclass(frozen=True)
class NlsrIdentification:
    """One run that found the neurons of a dimension and chose the modules to patch.

    Attributes:
        settings: the settings of the run.
        modules: the modules in scope, in the order of the architecture table; those left alone included.
        choices: similarity, rank, probability and draw of every module that could be patched, in the same order.
            A module whose whole region is protected is not among them and does not count for the ranks.
        unreached: linear modules in the blocks and kinds in scope where nothing can be transplanted: the reference
            equals the base there, or a LoRA subject has no adapter on it.
        linear_parameters: number of entries of all linear modules of the model.
        selected_parameters: number of entries of the selected rows.
        counted_tokens: tokens of the safe pairs that were counted; 0 without a forward pass.
    """

    settings: NlsrSettings
    modules: tuple[NlsrModule, ...]
    choices: tuple[ModuleChoice, ...]
    unreached: tuple[str, ...]
    linear_parameters: int
    selected_parameters: int
    counted_tokens: int

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that safetensors can store; `summary` holds the rest.

        Names are `KIND/MODULE` with KIND out of scores, ranks, region, selected and already_protected, and of mask_A
        and mask_B (uint8, 1 inside) in form factor.
        """
        found: dict[str, Tensor] = {}
        for part in self.modules:
            for kind in _MODULE_TENSORS:
                # Region and selection of a patched module may be one tensor, which safetensors refuses to store twice.
                found[f"{kind}/{part.module}"] = getattr(part, kind).clone(memory_format=torch.contiguous_format)
            if part.masks is not None:
                found[f"mask_A/{part.module}"] = part.masks.A.to(torch.uint8).contiguous()
                found[f"mask_B/{part.module}"] = part.masks.B.to(torch.uint8).contiguous()
        return found

    def summary(self) -> dict[str, Any]:
        """Everything that is no tensor, ready for JSON."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "modules": [{"module": part.module, "input_group": part.input_group} for part in self.modules],
            "choices": [asdict(choice) for choice in self.choices],
            "unreached": list(self.unreached),
            **{name: getattr(self, name) for name in _FIGURES},
        }

    @classmethod
    def from_parts(cls, summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "NlsrIdentification":
        """The identification that `summary` and `tensors` came from.

        Raises:
            SettingsError: an entry or a tensor is missing, or the settings are not valid.
        """
        try:
            return cls(
                settings=NlsrSettings.model_validate(summary["settings"]),
                modules=tuple(_module_from_parts(entry, tensors) for entry in summary["modules"]),
                choices=tuple(ModuleChoice(**choice) for choice in summary["choices"]),
                unreached=tuple(summary["unreached"]),
                **{name: summary[name] for name in _FIGURES},
            )
        except (KeyError, TypeError, ValidationError) as broken:
            raise SettingsError(
                f"A stored identification cannot be read ({broken})", "Identify again with this version"
            ) from broken


def _module_from_parts(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NlsrModule:
    module = str(entry["module"])
    masks = None
    if f"mask_A/{module}" in tensors:
        masks = FactorMasks(tensors[f"mask_A/{module}"].bool(), tensors[f"mask_B/{module}"].bool())
    return NlsrModule(
        module=module,
        input_group=str(entry["input_group"]),
        masks=masks,
        **{kind: tensors[f"{kind}/{module}"] for kind in _MODULE_TENSORS},
    )
