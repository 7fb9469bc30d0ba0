"""Attribution against gradients of weights, and against what taking updates back really does to the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.attribution import (
    Attribution,
    attribution,
    direction_gains,
    neuron_gains,
    require_update_memory,
)
from algorithms.calibration import CalibrationItem
from algorithms.differences import Difference
from algorithms.errors import CalibrationError, SettingsError
from algorithms.loading import load_model
from algorithms.weights import open_weights
from tests.tiny_models import load_model as plain_model
from tests.tiny_models import merged_model, quiet, save_adapter, save_model, save_variant

ANSWERED = tuple(
    CalibrationItem(tuple(ids), tuple([False] * prompt + [True] * (len(ids) - prompt)), prompt)
    for ids, prompt in (([5, 9, 7, 11, 30, 8], 3), ([6, 4, 12, 40], 2), ([21, 20, 19, 18, 17, 16, 15], 5))
)
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "phi3")


def attributed(
    model: nn.Module, updates: dict[str, Difference], items: Sequence[CalibrationItem] = ANSWERED, **more: Any
) -> Attribution:
    parts = {name: neuron_gains(update) for name, update in updates.items()}
    return attribution(model, items, parts, **{"batch_size": 2, "pad_id": 0, **more})


def scores(*arguments: Any, **more: Any) -> dict[str, Tensor]:
    return dict(attributed(*arguments, **more).gains)


def mean_loss(model: nn.Module) -> Tensor:
    """−log p of the labelled tokens, one prompt at a time."""
    losses = []
    for item in ANSWERED:
        ids = torch.tensor([item.input_ids])
        logits = model(input_ids=ids).logits[0, item.prompt_tokens - 1 : -1].float()
        losses.append(nn.functional.cross_entropy(logits, ids[0, item.prompt_tokens :], reduction="none"))
    return torch.cat(losses).mean()


@pytest.fixture(params=FAMILIES)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A subject and its aligned model."""
    aligned = save_model(tmp_path / "aligned", request.param)
    return save_variant(aligned, tmp_path / "subject", seed=2), aligned


def test_it_is_the_gradient_of_every_weight_row_times_its_update(full: tuple[Path, Path]) -> None:
    subject, aligned = (open_weights(path) for path in full)
    updates = {name: Difference(subject, aligned, name) for name in subject.modules}
    found = scores(load_model(full[0])[0], updates)
    model = plain_model(full[0])
    mean_loss(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, module in subject.modules.items():
        gradient = gradients[module.tensor] if module.tensor in gradients else gradients[f"{name}.weight"]
        if module.transposed:
            gradient = gradient.T
        expected = (gradient * updates[name].rows(slice(0, module.out_features))).sum(dim=1) / module.in_features
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-3)


def test_of_an_adapter_it_is_that_of_the_merged_model(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    paths = [save_adapter(base, tmp_path / name, seed=seed) for name, seed in (("subject", 3), ("aligned", 4))]
    subject, aligned = (open_weights(path, base) for path in paths)
    updates = {name: Difference(subject, aligned, name) for name in subject.modules}
    with quiet():
        found = scores(load_model(paths[0], base)[0], updates)
    model = merged_model(base, paths[0]).requires_grad_()
    mean_loss(model).backward()
    for name, update in updates.items():
        gradient = model.get_submodule(name).weight.grad
        assert gradient is not None
        expected = (gradient * update.rows(slice(0, update.shape[0]))).sum(dim=1) / update.shape[1]
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-3)


def test_taking_a_small_update_back_lowers_the_loss_by_what_it_says(tmp_path: Path) -> None:
    aligned = save_model(tmp_path / "aligned")
    subject = save_variant(aligned, tmp_path / "subject", scale=1e-3)
    sources = open_weights(subject), open_weights(aligned)
    updates = {name: Difference(*sources, name) for name in sources[0].modules}
    found = scores(load_model(subject)[0], updates)
    foretold = sum(float(found[name].double().sum()) * update.shape[1] for name, update in updates.items())
    model = plain_model(subject).double()
    before = mean_loss(model)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight -= update.rows(slice(0, update.shape[0])).double()
    assert foretold == pytest.approx((before - mean_loss(model)).item(), rel=0.05)


def test_the_loss_is_the_mean_over_all_counted_tokens_whatever_the_batches(tmp_path: Path) -> None:
    aligned = save_model(tmp_path / "aligned")
    weights = open_weights(aligned)
    updates = {name: Difference(weights, weights, name) for name in weights.modules}
    model, _ = load_model(aligned)
    expected = mean_loss(plain_model(aligned)).item()
    for size in (1, 2, 3):
        assert attributed(model, updates, batch_size=size).loss == pytest.approx(expected, rel=1e-4)


def test_two_losses_add_up_with_their_gains() -> None:
    one = Attribution(2.0, {"a": torch.tensor([1.0, -1.0])})
    other = Attribution(0.5, {"a": torch.tensor([2.0, 4.0])})
    both = one.plus(other, 0.5)
    assert both.loss == 2.25
    assert both.gains["a"].tolist() == [2.0, 1.0]


def test_batches_and_padding_do_not_change_it_and_weights_ask_for_gradients_as_before(tmp_path: Path) -> None:
    aligned = save_model(tmp_path / "aligned")
    subject = save_variant(aligned, tmp_path / "subject", seed=2)
    updates = {
        name: Difference(open_weights(subject), open_weights(aligned), name) for name in open_weights(subject).modules
    }
    model, _ = load_model(subject)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    one = scores(model, updates, batch_size=1)
    three = scores(model, updates, batch_size=3, pad_id=7)
    for name in updates:
        torch.testing.assert_close(one[name], three[name], atol=1e-7, rtol=1e-4)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_update_means_no_attribution_and_no_answer_is_refused(tmp_path: Path) -> None:
    aligned = save_model(tmp_path / "aligned")
    weights = open_weights(aligned)
    updates = {name: Difference(weights, weights, name) for name in weights.modules}
    model, _ = load_model(aligned)
    assert not any(bool(values.any()) for values in scores(model, updates).values())
    unanswered = [CalibrationItem(item.input_ids, (True,) * len(item.mask), len(item.mask)) for item in ANSWERED]
    with pytest.raises(CalibrationError, match="No answer token"):
        scores(model, updates, unanswered)


def test_dense_updates_that_would_not_fit_are_refused(tmp_path: Path) -> None:
    aligned = save_model(tmp_path / "aligned")
    subject = save_variant(aligned, tmp_path / "subject")
    updates = {
        name: Difference(open_weights(subject), open_weights(aligned), name) for name in open_weights(subject).modules
    }
    require_update_memory(updates.values(), 1e-3)
    with pytest.raises(SettingsError, match="gram_memory_gib"):
        require_update_memory(updates.values(), 1e-9)


@pytest.mark.parametrize("held", [False, True])
def test_of_a_direction_it_is_the_gradient_times_what_is_taken_out(full: tuple[Path, Path], held: bool) -> None:
    subject, aligned = (open_weights(path) for path in full)
    updates = {name: Difference(subject, aligned, name) for name in subject.modules}
    generator = torch.Generator().manual_seed(0)
    bases, parts, kept = {}, {}, torch.tensor([1, 3]) if held else None
    for name, update in updates.items():
        bases[name] = torch.linalg.qr(torch.randn(update.shape[1], 3, generator=generator)).Q
        parts[name] = direction_gains(update, bases[name], kept)
    found = attribution(load_model(full[0])[0], ANSWERED, parts, batch_size=2, pad_id=0).gains
    model = plain_model(full[0])
    mean_loss(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, module in subject.modules.items():
        gradient = gradients[module.tensor] if module.tensor in gradients else gradients[f"{name}.weight"]
        gradient = gradient.T if module.transposed else gradient
        U = updates[name].rows(slice(0, module.out_features)).clone()
        if kept is not None:
            U[kept] = 0
        for column, q in enumerate(bases[name].T):
            expected = (gradient * torch.outer(U @ q, q)).sum()
            torch.testing.assert_close(found[name][column], expected, atol=1e-5, rtol=1e-3)
