"""What calibration prompts do to the inputs and outputs of linear modules, in one forward pass and without storing it.

Hooks add every counted token to running sums; no activation outlives its layer. Modules that get the same input (q, k
and v; gate and up) share one set of input sums. Padding and uncounted tokens are masked out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from algorithms.architectures import LinearModule
from algorithms.calibration import Batch, CalibrationItem, batches
from algorithms.errors import CalibrationError, NonFiniteError, SettingsError, UnsupportedModelError
from algorithms.loading import input_device, linear_module, unwrapped

GIB = 2**30


class Observer(Protocol):
    """Something that watches a forward pass through hooks."""

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put hooks on the model; the caller removes them."""
        ...

    def begin(self, batch: Batch) -> None:
        """Called before each batch runs."""
        ...


@dataclass(frozen=True)
class WantedStatistics:
    """What to accumulate.

    Attributes:
        input_squares: Σ x_j² of each module input.
        second_moments: Σ x xᵀ of each module input.
        outputs: Σ |y_i| and Σ y_i² of each module.
        gram_dtype: precision of Σ x xᵀ. Vectors are summed in float64 always.
        projections: for some modules a matrix R (ρ, in); Σ (R x)(R x)ᵀ is accumulated for them.
    """

    input_squares: bool = False
    second_moments: bool = False
    outputs: bool = False
    gram_dtype: torch.dtype = torch.float32
    projections: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Whether no forward pass is needed."""
        return not (self.input_squares or self.second_moments or self.outputs or self.projections)


@dataclass(frozen=True)
class OutputMoments:
    """Mean and variance of |y_i| over the counted tokens; (out,) float64 each."""

    mean: Tensor
    variance: Tensor
    tokens: int


@dataclass(frozen=True)
class PromptStatistics:
    """What one prompt set did, by input group or module name.

    Attributes:
        tokens: counted tokens.
        input_norms: ‖X_j‖₂ over the counted tokens, (in,) float64, by input group.
        second_moments: G, mean of x xᵀ, (in, in), by input group.
        outputs: moments of |y|, by module.
        projected_moments: mean of (R x)(R x)ᵀ, (ρ, ρ) float64, by module.
    """

    tokens: int
    input_norms: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    outputs: dict[str, OutputMoments]
    projected_moments: dict[str, Tensor]


class StatisticsCollector:
    """An observer that accumulates the wanted statistics of some modules.

    Args:
        modules: the modules to watch.
        wanted: what to accumulate.
    """

    def __init__(self, modules: Sequence[LinearModule], wanted: WantedStatistics) -> None:
        self._modules = modules
        self._wanted = wanted
        self._tokens = 0
        self._mask: Tensor | None = None
        self._squares: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._projected: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}
        self._output_squares: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put one hook on every module."""
        handles: list[RemovableHandle] = []
        leaders: set[str] = set()
        for module in self._modules:
            leads = module.input_group not in leaders
            leaders.add(module.input_group)
            hook = self._hook(module, leads=leads)
            handles.append(linear_module(model, module.name).register_forward_hook(hook, with_kwargs=True))
        return handles

    def begin(self, batch: Batch) -> None:
        """Note which tokens of the coming batch count."""
        self._mask = batch.count_mask
        self._tokens += int(batch.count_mask.sum())

    def result(self) -> PromptStatistics:
        """Means and norms of what was seen; on the CPU.

        Raises:
            CalibrationError: no token was counted.
            NonFiniteError: a sum is NaN or infinite.
        """
        if self._tokens == 0:
            raise CalibrationError("No calibration token was counted", "Give prompts, or count other tokens")
        for sums in (self._squares, self._grams, self._projected, self._magnitudes, self._output_squares):
            for name, value in sums.items():
                if not bool(torch.isfinite(value).all()):
                    raise NonFiniteError(
                        f"The activations of {name} hold NaN or infinity",
                        "Load the model in float32 or bfloat16 and check that it generates sensible text",
                    )
        return PromptStatistics(
            tokens=self._tokens,
            input_norms={name: value.cpu().sqrt() for name, value in self._squares.items()},
            second_moments={name: value.cpu().div_(self._tokens) for name, value in self._grams.items()},
            outputs={name: self._moments(name) for name in self._magnitudes},
            projected_moments={name: value.cpu() / self._tokens for name, value in self._projected.items()},
        )

    def _moments(self, name: str) -> OutputMoments:
        mean = self._magnitudes[name].cpu() / self._tokens
        variance = (self._output_squares[name].cpu() / self._tokens - mean.square()).clamp_min(0.0)
        return OutputMoments(mean, variance, self._tokens)

    def _hook(self, module: LinearModule, *, leads: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            x: Tensor | None = None
            if leads or module.name in self._wanted.projections:
                x = self._counted(inputs, module.name)
            if x is not None and leads:
                self._add_inputs(module.input_group, x)
            if x is not None and module.name in self._wanted.projections:
                R = self._wanted.projections[module.name].to(x.device)
                projected = (x @ R.T).double()
                _add(self._projected, module.name, projected.T @ projected)
            if self._wanted.outputs:
                y = self._counted(output, module.name).double()
                _add(self._magnitudes, module.name, y.abs().sum(dim=0))
                _add(self._output_squares, module.name, y.square().sum(dim=0))

        return hook

    def _add_inputs(self, group: str, x: Tensor) -> None:
        if self._wanted.input_squares:
            _add(self._squares, group, x.double().square().sum(dim=0))
        if self._wanted.second_moments:
            x = x.to(self._wanted.gram_dtype)
            if group in self._grams:
                self._grams[group].addmm_(x.T, x)
            else:
                self._grams[group] = x.T @ x

    def _counted(self, values: Tensor, module: str) -> Tensor:
        """The rows of the counted tokens, float32 (tokens, width)."""
        if self._mask is None:
            raise CalibrationError("The model ran outside a calibration batch", "Run it through run_prompts")
        mask = self._mask.to(values.device).reshape(-1)
        rows = values.detach().reshape(-1, values.shape[-1])
        if len(rows) != len(mask):
            raise UnsupportedModelError(
                f"{module} saw {len(rows)} token positions where the batch has {len(mask)}",
                "Use a family from the documented table; routed or packed modules are not reached",
            )
        return rows[mask].float()


def run_prompts(
    model: nn.Module,
    items: Sequence[CalibrationItem],
    observers: Sequence[Observer],
    *,
    batch_size: int,
    pad_id: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run prompts through the model for what the observers see; nothing is returned or kept.

    Args:
        model: plain or PEFT-wrapped, in evaluation mode.
        items: tokenized prompts.
        observers: hooks for the time of the pass.
        batch_size: prompts per forward pass.
        pad_id: token id to pad with.
        progress: called with prompts done and prompts in all.
    """
    inner = unwrapped(model)
    # The backbone alone: logits over the vocabulary are not needed and can be the largest tensor of all.
    backbone: Callable[..., Any] = getattr(inner, "base_model", inner)
    device = input_device(inner)
    handles = [handle for observer in observers for handle in observer.attach(model)]
    try:
        done = 0
        with torch.no_grad():
            for batch in batches(items, batch_size, pad_id):
                for observer in observers:
                    observer.begin(batch)
                backbone(
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device),
                    use_cache=False,
                )
                done += len(batch.indices)
                if progress is not None:
                    progress(done, len(items))
    finally:
        for handle in handles:
            handle.remove()


def gram_bytes(modules: Iterable[LinearModule], dtype: torch.dtype) -> int:
    """Memory of the second moments of these modules' inputs, one per input group."""
    widths = {module.input_group: module.in_features for module in modules}
    return sum(width * width for width in widths.values()) * dtype.itemsize


def require_gram_memory(modules: Sequence[LinearModule], dtype: torch.dtype, limit_gib: float) -> None:
    """Refuse second moments that would not fit.

    Raises:
        SettingsError: they need more than `limit_gib`.
    """
    needed = gram_bytes(modules, dtype) / GIB
    if needed > limit_gib:
        raise SettingsError(
            f"Gram matrices of {len(modules)} modules need {needed:.1f} GiB, over gram_memory_gib = {limit_gib:g}",
            "Narrow layers or modules, choose another score or operation, or raise gram_memory_gib",
        )


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
