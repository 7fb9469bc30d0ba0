"""Weight sources held in memory, for tests of mathematics that needs no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.weights import LoraFactors


def linear(name: str, outputs: int, inputs: int, *, block: int = 0, group: str | None = None) -> LinearModule:
    return LinearModule(
        name=name,
        block=block,
        kind=name.rsplit(".", 1)[-1],
        tensor=f"{name}.weight",
        out_features=outputs,
        in_features=inputs,
        transposed=False,
        input_group=group or name,
    )


@dataclass
class FullWeights:
    """A full checkpoint: one dense tensor per module."""

    path: Path
    weights: Mapping[str, Tensor]
    modules: Mapping[str, LinearModule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            self.modules = {name: linear(name, *tensor.shape) for name, tensor in self.weights.items()}

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        return self.weights[module][index].float().clone()

    def factors(self, module: str) -> LoraFactors | None:
        return None


@dataclass
class LoraWeights:
    """An adapter on a full checkpoint."""

    path: Path
    base: FullWeights
    lora: Mapping[str, LoraFactors]

    @property
    def modules(self) -> Mapping[str, LinearModule]:
        return self.base.modules

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        factors = self.lora.get(module)
        rows = self.base.rows(module, index)
        return rows if factors is None else rows + factors.scale * factors.B[index] @ factors.A

    def factors(self, module: str) -> LoraFactors | None:
        return self.lora.get(module)


def full(name: str, **weights: Tensor) -> FullWeights:
    return FullWeights(Path("/models") / name, weights)


def lora(name: str, base: FullWeights, **factors: LoraFactors) -> LoraWeights:
    return LoraWeights(Path("/models") / name, base, factors)


def noise(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(outputs: int, inputs: int, rank: int, *, seed: int, scale: float = 2.0) -> LoraFactors:
    return LoraFactors(noise(rank, inputs, seed=seed), noise(outputs, rank, seed=seed + 1), scale)
