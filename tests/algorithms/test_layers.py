"""The layer curve and the choice of blocks."""

import math

import pytest
import torch

from algorithms.calibration import CalibrationItem
from algorithms.errors import CalibrationError, NonFiniteError, SettingsError
from algorithms.layers import LastPromptStates, blocks_in_scope, gap_curve, layer_scores
from algorithms.settings import FgsnSettings
from algorithms.statistics import run_prompts
from tests.tiny_models import build_model


def item(tokens: list[int], prompt_tokens: int) -> CalibrationItem:
    return CalibrationItem(tuple(tokens), tuple([True] * len(tokens)), prompt_tokens)


def scope(gaps: list[float], **choice: object) -> list[int]:
    return list(blocks_in_scope(torch.tensor(gaps, dtype=torch.float64), FgsnSettings.model_validate(choice)))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_states_are_those_before_the_answer_in_the_order_of_the_prompts(batch_size: int) -> None:
    model = build_model("llama")
    items = [item([5, 6, 7, 8, 9, 10], 4), item([11, 12], 2), item([13, 14, 15, 16], 3)]
    observer = LastPromptStates()
    run_prompts(model, items, [observer], batch_size=batch_size, pad_id=0)
    found = observer.result()
    assert found.shape == (3, 2, 16)
    for number, one in enumerate(items):
        with torch.no_grad():
            prompt = torch.tensor([one.input_ids[: one.prompt_tokens]])
            hidden = model(prompt, output_hidden_states=True).hidden_states
        # The last hidden state of transformers has passed the final norm.
        torch.testing.assert_close(found[number, 0], hidden[1][0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.model.norm(found[number, 1]), hidden[2][0, -1], atol=1e-5, rtol=1e-4)


def test_hooks_are_removed_even_when_the_pass_fails() -> None:
    model = build_model("llama")
    with pytest.raises(IndexError):
        run_prompts(model, [item([5, 10_000], 2)], [LastPromptStates()], batch_size=1, pad_id=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gap_is_the_difference_of_two_mean_angles() -> None:
    axes = torch.eye(3)
    benign = torch.stack([axes[0], axes[1]])[:, None, :]
    harmful = axes[2][None, None, :]
    # Every pair is orthogonal, so both means are a right angle.
    assert gap_curve(harmful, benign, 50, 0).tolist() == pytest.approx([0.0], abs=1e-9)
    same = torch.stack([axes[0], axes[0] * 3])[:, None, :]
    assert gap_curve(harmful, same, 50, 0).tolist() == pytest.approx([math.pi / 2])
    assert gap_curve(-same[:1], same, 50, 0).tolist() == pytest.approx([math.pi])


def test_a_small_angle_keeps_its_precision() -> None:
    benign = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    harmful = torch.tensor([[[1.0, 1e-6]]])
    assert float(gap_curve(harmful, benign, 10, 0)) == pytest.approx(1e-6, rel=1e-3)


def test_pairs_of_benign_prompts_are_never_one_prompt_twice() -> None:
    benign = torch.eye(2)[:, None, :]
    gap = gap_curve(torch.eye(2)[:1, None, :], benign, 400, 0)
    # Benign pairs are all a right angle; half of the harmful pairs are 0.
    assert float(gap) == pytest.approx(-math.pi / 4, abs=0.2)


def test_the_curve_depends_on_the_seed_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    harmful, benign = (torch.randn(6, 4, 8, generator=generator) for _ in range(2))
    assert torch.equal(gap_curve(harmful, benign, 100, 1), gap_curve(harmful, benign, 100, 1))
    assert not torch.equal(gap_curve(harmful, benign, 100, 1), gap_curve(harmful, benign, 100, 2))


@pytest.mark.parametrize(("harmful", "benign"), [(0, 2), (1, 1)])
def test_too_few_prompts_are_refused(harmful: int, benign: int) -> None:
    with pytest.raises(CalibrationError, match="two benign"):
        gap_curve(torch.ones(harmful, 1, 2), torch.ones(benign, 1, 2), 5, 0)


def test_window_and_value_pick_different_blocks() -> None:
    gaps = [0.1, 0.1, 0.5, 0.6, 0.7, 0.7]
    assert scope(gaps, layers="window", window=2) == [2, 3]
    assert scope(gaps, layers="value", window=2) == [4, 5]
    assert scope([0.5, 0.4, 0.3], layers="window", window=1) == [0], "growth of the first block starts at 0"


@pytest.mark.parametrize(("depth", "width"), [(2, 1), (6, 1), (16, 3), (32, 6), (30, 6)])
def test_the_default_window_is_six_blocks_in_thirty_two(depth: int, width: int) -> None:
    assert len(scope([0.1 * block for block in range(depth)], layers="window")) == width


def test_all_and_explicit_ranges() -> None:
    assert scope([0.0] * 4, layers="all") == [0, 1, 2, 3]
    assert scope([0.0] * 4, layers="1..2") == [1, 2]
    with pytest.raises(SettingsError, match="beyond the last block, 3"):
        scope([0.0] * 4, layers="2..4")
    with pytest.raises(SettingsError, match="wider than the model"):
        scope([0.0] * 4, layers="window", window=5)


def test_the_whole_curve_is_kept() -> None:
    found = layer_scores(torch.tensor([0.25, 0.75, 0.5], dtype=torch.float64), range(1, 2))
    assert [(one.block, one.gap, one.growth, one.in_scope) for one in found] == [
        (0, 0.25, 0.25, False),
        (1, 0.75, 0.5, True),
        (2, 0.5, -0.25, False),
    ]


def test_nan_states_name_the_block() -> None:
    model = build_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    observer = LastPromptStates()
    run_prompts(model, [item([5, 6], 2)], [observer], batch_size=1, pad_id=0)
    with pytest.raises(NonFiniteError, match="block 1"):
        observer.result()
