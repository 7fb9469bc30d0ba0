"""Attribution: how much taking a part of the update back would help the model give the answers that it should give.

    ⟨∂L/∂W, part of U⟩,    L = mean of −log p over the counted answer tokens

is the first-order fall of the loss L when that part of the update U is taken out. Parts are the rows U_i, for neurons,
or U q qᵀ, for input directions q. No gradient of a weight is formed: with δ = ∂L/∂y at the module's output y,

    ⟨∂L/∂W_i, U_i⟩ = Σ_tokens δ_i · (U x)_i,        ⟨∂L/∂W, U q qᵀ⟩ = Σ_tokens (δ · U q) (q · x),

so one backward pass to the activations gives every module's. Relatives: SNIP (1810.02340), whose saliency is
|∂L/∂w · w|, and attribution patching.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from algorithms.calibration import Batch, CalibrationItem, batches
from algorithms.differences import Difference
from algorithms.errors import CalibrationError, NonFiniteError, SettingsError, UnsupportedModelError
from algorithms.loading import input_device, linear_module, unwrapped
from algorithms.statistics import GIB

Gains = Callable[[Tensor, Tensor], Tensor]
"""What a module's n parts gain, (n,), from its inputs (tokens, in) and the gradient at its outputs (tokens, out)."""


@dataclass(frozen=True)
class Attribution:
    """What the answers' loss in one model comes to, and what each part of its update has to do with it.

    Attributes:
        loss: mean of −log p over the counted answer tokens, in nats.
        gains: of the n parts of each module, (n,) float32, in nats.
    """

    loss: float
    gains: Mapping[str, Tensor]

    def plus(self, other: "Attribution", weight: float) -> "Attribution":
        """The attribution of a sum of two losses, the other one weighted."""
        gains = {name: values + weight * other.gains[name] for name, values in self.gains.items()}
        return Attribution(self.loss + weight * other.loss, gains)


def neuron_gains(update: Difference) -> Gains:
    """What each row of U gains when it is taken out, for each entry of the row: (out,)."""
    # Two thin products where U is of low rank.
    parts = update.factors() or (update.rows(slice(0, update.shape[0])),)

    def gains(x: Tensor, delta: Tensor) -> Tensor:
        moved = x
        for part in reversed(parts):
            moved = moved @ part.to(x.device).T
        # float64: batches are summed in an order that depends on their size, and the ranking should not.
        return (delta * moved).sum(dim=0, dtype=torch.float64) / update.shape[1]

    return gains


def direction_gains(update: Difference, directions: Tensor, kept: Tensor | None = None) -> Gains:
    """What U q qᵀ gains when it is taken out, for every column q of Q (in, r): (r,).

    Args:
        update: U.
        directions: Q, orthonormal columns.
        kept: rows of U that stay as they are.
    """
    moved = update.times(directions)
    if kept is not None:
        moved[kept] = 0

    def gains(x: Tensor, delta: Tensor) -> Tensor:
        along = (x @ directions.to(x.device)) * (delta @ moved.to(x.device))
        return along.sum(dim=0, dtype=torch.float64)

    return gains


def attribution(
    model: nn.Module,
    items: Sequence[CalibrationItem],
    parts: Mapping[str, Gains],
    *,
    batch_size: int,
    pad_id: int,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """The loss of some answers, and what the parts of some modules' updates gain when they are taken out.

    Args:
        model: where the loss is differentiated, plain or PEFT-wrapped, in evaluation mode; its weights do not change.
        items: tokenized prompts with answers; the loss counts the tokens after the prompt that their masks count.
        parts: by the module's canonical name.
        batch_size: prompts per pass.
        pad_id: token id to pad with.
        progress: called with prompts done and prompts in all.

    Raises:
        CalibrationError: no answer token is counted.
        NonFiniteError: the loss is NaN or infinite.
        UnsupportedModelError: a module's output does not take part in the loss, or a part of the model is offloaded.
    """
    labelled = labelled_tokens(items)
    if not labelled:
        raise CalibrationError(
            "No answer token is counted, so there is no answer to attribute",
            "Register the prompts with answers, or let tokens hold answer",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            "A part of the model is offloaded from the devices that it runs on, where no loss can be differentiated",
            "Place all of it on devices, leave the device map out, or choose a score of a forward pass, such as damage",
        )
    collector = _Collector(parts)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [*collector.attach(model), _differentiable_inputs(model)]
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        done, total = 0, 0.0
        with torch.enable_grad():
            for batch in batches(items, batch_size, pad_id):
                # The sum is differentiated, not the mean: in 16 bits small gradients would vanish.
                loss = _loss(model, batch, [items[index] for index in batch.indices])
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        "The loss of the calibration answers is NaN or infinite",
                        "Load the model in float32 or bfloat16 and check that it generates sensible text",
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item() / labelled
                done += len(batch.indices)
                if progress is not None:
                    progress(done, len(items))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad = True
    return Attribution(total, {name: (value / labelled).float() for name, value in collector.result().items()})


class _Collector:
    """Adds up what the parts gain over all tokens, by hooks on the modules' outputs."""

    def __init__(self, parts: Mapping[str, Gains]) -> None:
        self._parts = parts
        self._sums: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        return [
            linear_module(model, name).register_forward_hook(partial(self._forward, name), with_kwargs=True)
            for name in self._parts
        ]

    def _forward(
        self, name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        output.register_hook(partial(self._backward, name, x))  # type: ignore[no-untyped-call]

    def _backward(self, name: str, x: Tensor, gradient: Tensor) -> None:
        delta = gradient.reshape(-1, gradient.shape[-1]).float().to(x.device)
        found = self._parts[name](x.reshape(-1, x.shape[-1]).float(), delta).cpu()
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def result(self) -> dict[str, Tensor]:
        for name in self._parts:
            if name not in self._sums:
                raise UnsupportedModelError(
                    f"{name} takes no part in the answers' loss",
                    "Use a family from the documented table; routed or packed modules are not reached",
                )
        return {name: self._sums[name] for name in self._parts}


def _loss(model: nn.Module, batch: Batch, items: Sequence[CalibrationItem]) -> Tensor:
    """Σ −log p over the labelled tokens of a batch."""
    device = input_device(model)
    ids = batch.input_ids.to(device)
    labelled = torch.zeros_like(batch.count_mask)
    for row, item in enumerate(items):
        labelled[row, : len(item.input_ids)] = torch.tensor(_labelled(item))
    logits = model(input_ids=ids, attention_mask=batch.attention_mask.to(device), use_cache=False).logits
    before = labelled[:, 1:].to(logits.device)
    wanted = ids[:, 1:].to(logits.device)[before]
    return nn.functional.cross_entropy(logits[:, :-1][before].float(), wanted, reduction="sum")


def _labelled(item: CalibrationItem) -> list[bool]:
    """Which tokens of an item the loss counts: those of the answer that its mask counts."""
    return [counts and place >= item.prompt_tokens for place, counts in enumerate(item.mask)]


def _differentiable_inputs(model: nn.Module) -> RemovableHandle:
    """Let the embeddings' output carry gradients, so that there is a graph without any weight that needs one."""
    embeddings: nn.Module = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
    return embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def labelled_tokens(items: Sequence[CalibrationItem]) -> int:
    """How many tokens the loss of these items is a mean over."""
    return sum(sum(_labelled(item)) for item in items)


def require_update_memory(updates: Iterable[Difference], limit_gib: float) -> None:
    """Refuse dense updates that would not fit.

    Raises:
        SettingsError: they need more than `limit_gib`.
    """
    dense = [update.shape for update in updates if update.factors() is None]
    needed = sum(4 * outputs * inputs for outputs, inputs in dense) / GIB
    if needed > limit_gib:
        raise SettingsError(
            f"The updates of {len(dense)} modules need {needed:.1f} GiB, over gram_memory_gib = {limit_gib:g}",
            "Narrow layers or modules, choose another score, or raise gram_memory_gib",
        )
