"""Tiny models that stand in a lineage, prompts for them, and identification in one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from algorithms.calibration import CalibrationItem
from algorithms.fgsn import Identification, identify
from algorithms.loading import load_model
from algorithms.settings import FgsnSettings, ModelRole
from algorithms.weights import WeightSource, open_weights
from tests.tiny_models import quiet

DEPTH = 4


@dataclass(frozen=True)
class Lineage:
    """Directories of a subject with its aligned model; `under` is the checkpoint below adapters."""

    subject: Path
    aligned: Path
    base: Path
    under: Path | None = None
    aligned_under: Path | None = None

    def sources(self) -> tuple[WeightSource, WeightSource]:
        return open_weights(self.subject, self.under), open_weights(self.aligned, self.aligned_under)


class Loader:
    """Gives models by role, and notes which were asked for."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self.asked: list[ModelRole] = []

    def __call__(self, role: ModelRole) -> nn.Module:
        self.asked.append(role)
        line = self._lineage
        path, under = (line.aligned, line.aligned_under) if role == "aligned" else (line.subject, line.under)
        with quiet():
            return load_model(path, under)[0]


def prompts(seed: int, low: int, high: int) -> list[CalibrationItem]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (6, 9, 7, 12, 8, 6):
        tokens = torch.randint(low, high, (length,), generator=generator).tolist()
        found.append(CalibrationItem(tuple(tokens), tuple([False] * 2 + [True] * (length - 2)), length - 2))
    return found


HARMFUL, BENIGN = prompts(1, 4, 30), prompts(2, 25, 60)


def run(lineage: Lineage, settings: FgsnSettings, **more: Any) -> Identification:
    subject, aligned = lineage.sources()
    arguments = {"load": Loader(lineage), "harmful": HARMFUL, "benign": BENIGN, "pad_id": 0, **more}
    return identify(subject, aligned, arguments.pop("head", subject), settings=settings, **arguments)


def all_selected(found: Identification) -> list[tuple[str, list[int]]]:
    return [(part.module, part.selected.tolist()) for part in found.modules]
