"""Safety-critical blocks: where in depth the aligned model tells harmful prompts from benign ones.

After each block, at the last token before the answer, the mean angle between harmful and benign states less the mean
angle among benign states is that block's gap. Source: "Safety Layers" 2408.17003, as FGSN 2508.09190 step 1 uses it;
the width of the window and the two ways to place it are decisions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from algorithms.calibration import Batch
from algorithms.errors import CalibrationError, NonFiniteError, SettingsError
from algorithms.loading import blocks
from algorithms.scope import fixed_blocks
from algorithms.settings import FgsnSettings


@dataclass(frozen=True)
class LayerScore:
    """How far apart one block of the aligned model holds harmful and benign prompts.

    Attributes:
        block: index of the block, from 0.
        gap: mean angle between harmful and benign minus mean angle among benign last-token states, in radians.
        growth: gap of this block minus gap of the block before (of the embeddings, 0, for the first).
        in_scope: whether neurons of this block were candidates.
    """

    block: int
    gap: float
    growth: float
    in_scope: bool


class LastPromptStates:
    """An observer that keeps, for each prompt, every block's output at the last token before the answer."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._states: dict[int, list[Tensor]] = {}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put one hook on every block."""
        return [block.register_forward_hook(self._hook()) for block in blocks(model)]

    def begin(self, batch: Batch) -> None:
        """Make room for the prompts of the coming batch."""
        self._batch = batch
        for index in batch.indices:
            self._states[index] = []

    def result(self) -> Tensor:
        """States in the order of the prompts, float32 (prompts, blocks, hidden).

        Raises:
            NonFiniteError: a state is NaN or infinite.
        """
        states = torch.stack([torch.stack(self._states[index]) for index in sorted(self._states)])
        finite = torch.isfinite(states).all(dim=2).all(dim=0)
        if not bool(finite.all()):
            raise NonFiniteError(
                f"The output of block {int((~finite).nonzero()[0])} holds NaN or infinity",
                "Load the model in float32 or bfloat16 and check that it generates sensible text",
            )
        return states

    def _hook(self) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            batch = self._batch
            if batch is None:
                raise CalibrationError("The model ran outside a calibration batch", "Run it through run_prompts")
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            rows = torch.arange(len(batch.indices), device=hidden.device)
            last = hidden.detach()[rows, batch.last_prompt.to(hidden.device)].float().cpu()
            for index, state in zip(batch.indices, last, strict=True):
                self._states[index].append(state)

        return hook


def gap_curve(harmful: Tensor, benign: Tensor, pairs: int, seed: int) -> Tensor:
    """The gap of every block, (blocks,) float64 radians.

    gap_l = mean angle(h_l(benign), h_l(harmful)) − mean angle(h_l(benign), h_l(benign')), each mean over `pairs` random
    pairs; benign and benign' are different prompts.

    Args:
        harmful: (prompts, blocks, hidden) states.
        benign: (prompts', blocks, hidden) states.
        pairs: pairs per mean.
        seed: of the draw of pairs.

    Raises:
        CalibrationError: no harmful prompt, or fewer than two benign ones.
    """
    if len(harmful) < 1 or len(benign) < 2:
        raise CalibrationError(
            f"The layer curve needs a harmful and two benign prompts; there are {len(harmful)} and {len(benign)}",
            "Give more prompts",
        )
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(len(benign), (pairs,), generator=generator)
    # A shift by 1 to n − 1 positions never meets the same prompt.
    other = (one + torch.randint(1, len(benign), (pairs,), generator=generator)) % len(benign)
    across = torch.randint(len(harmful), (pairs,), generator=generator)
    gaps = [
        _mean_angle(benign[one, block], harmful[across, block]) - _mean_angle(benign[one, block], benign[other, block])
        for block in range(benign.shape[1])
    ]
    return torch.stack(gaps)


def blocks_in_scope(gaps: Tensor, settings: FgsnSettings) -> range:
    """The blocks whose neurons are candidates.

    Args:
        gaps: (blocks,) the gap curve; only its length matters for `all` and explicit ranges.
        settings: `layers` and `window`.

    Raises:
        SettingsError: an explicit range ends beyond the last block, or the window is wider than the model is deep.
    """
    fixed = fixed_blocks(len(gaps), settings)
    if fixed is not None:
        return fixed
    depth = len(gaps)
    width = settings.window or max(1, round(6 * depth / 32))
    if width > depth:
        raise SettingsError(f"window = {width} is wider than the model's {depth} blocks", "Use a narrower window")
    if settings.layers == "value":
        merit = gaps.unfold(0, width, 1).sum(dim=1)
    else:
        merit = gaps[width - 1 :] - torch.cat([gaps.new_zeros(1), gaps])[: depth - width + 1]
    first = int(merit.argmax())
    return range(first, first + width)


def layer_scores(gaps: Tensor, scope: Sequence[int] | range) -> tuple[LayerScore, ...]:
    """The whole curve with growth and scope, one entry per block."""
    values = [float(gap) for gap in gaps]
    before = [0.0, *values[:-1]]
    return tuple(
        LayerScore(block, gap, gap - previous, block in scope)
        for block, (gap, previous) in enumerate(zip(values, before, strict=True))
    )


def _mean_angle(x: Tensor, y: Tensor) -> Tensor:
    x, y = nn.functional.normalize(x.double(), dim=-1), nn.functional.normalize(y.double(), dim=-1)
    # atan2 keeps its precision where the angle is small, which arccos does not.
    return (2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))).mean()
