"""Parity with the published SafeLoRA code on golden numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from algorithms.errors import SettingsError
from algorithms.safelora import safelora_cosine, safelora_edits, safelora_modules
from algorithms.weights import open_weights
from tests.algorithms.fakes import full, noise

GOLDEN = Path(__file__).parents[1] / "golden"
PREFIX = "base_model.model."


@pytest.fixture
def models():
    return (
        open_weights(GOLDEN / "finetuned_lora", base=GOLDEN / "aligned"),
        open_weights(GOLDEN / "aligned"),
        open_weights(GOLDEN / "base"),
    )


def test_cosines_are_those_of_the_published_code(models) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["safelora_cosine"]
    found = {PREFIX + verdict.module: verdict.cosine for verdict in safelora_modules(*models, threshold=2.0)}
    assert found.keys() == expected.keys()
    for name, cosine in expected.items():
        assert found[name] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(
    ("choice", "file", "count"),
    [({"threshold": 2.0}, "safelora_threshold_all", 21), ({"number": 10}, "safelora_number_10", 10)],
)
def test_projected_adapters_are_those_of_the_published_code(models, choice, file, count) -> None:
    expected = load_file(GOLDEN / f"{file}.safetensors")
    subject = models[0]
    verdicts = safelora_modules(*models, **choice)
    assert sum(verdict.projected for verdict in verdicts) == count
    for verdict in verdicts:
        factors = subject.factors(verdict.module)
        B = factors.B
        if verdict.projected:
            edits = list(safelora_edits(*models, verdict.module))
            assert all(edit.extension is None for edit in edits)
            B = torch.cat([edit.values for edit in edits])
        torch.testing.assert_close(B, _named(expected, verdict.module, "lora_B"), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(factors.A, _named(expected, verdict.module, "lora_A"), atol=0, rtol=0)


def test_a_full_subject_gives_the_cosine_of_the_dense_formula() -> None:
    base = noise(9, 7, seed=0)
    V, U = noise(9, 7, seed=1), noise(9, 7, seed=2)
    subject, aligned = full("subject", m=base + V + U), full("aligned", m=base + V)
    CU = (V @ V.T / V.norm()) @ U
    expected = torch.nn.functional.cosine_similarity(CU.reshape(1, -1), U.reshape(1, -1))
    assert safelora_cosine(subject, aligned, full("base", m=base), "m") == pytest.approx(float(expected), abs=1e-5)
    (edit,) = safelora_edits(subject, aligned, full("base", m=base), "m")
    torch.testing.assert_close(edit.values, base + V + CU, atol=1e-4, rtol=1e-4)


def test_a_module_without_update_is_left_alone() -> None:
    aligned = full("aligned", m=noise(4, 3, seed=0))
    subject = full("subject", m=aligned.weights["m"].clone())
    (verdict,) = safelora_modules(subject, aligned, full("base", m=noise(4, 3, seed=1)), threshold=0.6)
    assert (verdict.cosine, verdict.projected) == (1.0, False)


def test_a_module_that_alignment_did_not_move_has_cosine_zero() -> None:
    aligned = full("aligned", m=noise(4, 3, seed=0))
    base = full("base", m=aligned.weights["m"].clone())
    assert safelora_cosine(full("subject", m=noise(4, 3, seed=1)), aligned, base, "m") == 0.0


@pytest.mark.parametrize("choice", [{}, {"threshold": 0.5, "number": 3}])
def test_exactly_one_way_to_choose_must_be_given(models, choice) -> None:
    with pytest.raises(SettingsError, match="exactly one"):
        safelora_modules(*models, **choice)


def _named(tensors, module, factor):
    (name,) = [name for name in tensors if f"{module}.{factor}" in name]
    return tensors[name]
