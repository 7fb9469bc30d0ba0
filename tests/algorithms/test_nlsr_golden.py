"""NLSR on golden numbers: what the published code and its formulas answered on small models."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from algorithms.calibration import CalibrationItem
from algorithms.low_rank import reduced_factors
from algorithms.nlsr import NlsrIdentification, identify
from algorithms.nlsr_settings import NlsrModelRole, NlsrSettings
from algorithms.statistics import StatisticsCollector, WantedStatistics, run_prompts
from algorithms.transplants import FactorEditor, transplanted_factors
from algorithms.weights import AdapterWeights, WeightSource, open_weights
from tests.tiny_models import quiet

GOLDEN = Path(__file__).parents[1] / "golden"
PREFIX = "base_model.model."

# What the golden files were made with: a kept rank of half the factor's, a region of 20 % of each factor.
AS_GOLDEN = NlsrSettings(
    mode="published-code", form="factor", sparsity=0.8, rank_sparsity=0.5, region_scope="matrix", selection="all"
)


def golden_calibration() -> list[CalibrationItem]:
    tokens = load_file(GOLDEN / "calibration.safetensors")["input_ids"]
    mask = tuple([False] * 8 + [True] * 12)
    return [CalibrationItem(tuple(row.tolist()), mask, 8) for row in tokens]


def golden_model(role: NlsrModelRole) -> nn.Module:
    """The golden models have no tokenizer, which `load_model` asks for."""
    assert role == "reference"
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "aligned", dtype=torch.float32)
        found: nn.Module = peft.PeftModel.from_pretrained(model, GOLDEN / "reference_lora").eval()
    return found


@pytest.fixture(scope="module")
def golden_sources() -> tuple[AdapterWeights, AdapterWeights, WeightSource]:
    subject = open_weights(GOLDEN / "finetuned_lora", GOLDEN / "aligned")
    reference = open_weights(GOLDEN / "reference_lora", GOLDEN / "aligned")
    assert isinstance(subject, AdapterWeights)
    assert isinstance(reference, AdapterWeights)
    return subject, reference, open_weights(GOLDEN / "aligned")


@pytest.fixture(scope="module")
def golden_found(golden_sources) -> NlsrIdentification:
    subject, reference, base = golden_sources
    return identify(
        subject,
        reference,
        base,
        subject,
        load=golden_model,
        safe=golden_calibration(),
        pad_id=0,
        settings=AS_GOLDEN,
    )


def of_factor(tensors: dict[str, Tensor], module: str, factor: str) -> Tensor:
    return tensors[f"{PREFIX}{module}.{factor}.weight"]


def test_low_rank_factors_are_those_of_the_published_formula(golden_sources) -> None:
    _, reference, _ = golden_sources
    expected = load_file(GOLDEN / "nlsr_low_rank_exact.safetensors")
    factors = {name: reference.factors(name) for name in reference.adapter.modules}
    scope = [reference.modules[name] for name in factors]
    collector = StatisticsCollector(
        scope, WantedStatistics(projections={name: found.A for name, found in factors.items()})
    )
    run_prompts(golden_model("reference"), golden_calibration(), [collector], batch_size=5, pad_id=0)
    moments = collector.result().projected_moments
    assert len(factors) == 21
    for name, found in factors.items():
        reduced = reduced_factors(found, moments[name], AS_GOLDEN)
        torch.testing.assert_close(reduced.A, of_factor(expected, name, "lora_A"), atol=1e-4, rtol=0)
        torch.testing.assert_close(reduced.B, of_factor(expected, name, "lora_B"), atol=1e-4, rtol=0)


def test_masks_are_those_of_the_published_code(golden_found) -> None:
    expected = load_file(GOLDEN / "nlsr_masks.safetensors")
    assert 2 * len(golden_found.modules) == len(expected)
    for part in golden_found.modules:
        assert part.masks is not None
        assert torch.equal(part.masks.A, of_factor(expected, part.module, "lora_A").bool()), part.module
        assert torch.equal(part.masks.B, of_factor(expected, part.module, "lora_B").bool()), part.module


def test_similarities_are_those_of_the_published_code(golden_found) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["nlsr_similarity"]
    found = {PREFIX + choice.module: choice.similarity for choice in golden_found.choices}
    assert found.keys() == expected.keys()
    for name, similarity in expected.items():
        assert found[name] == pytest.approx(similarity, abs=1e-5)


def test_transplanted_adapters_are_those_of_the_published_code(golden_found, golden_sources) -> None:
    subject, reference, _ = golden_sources
    expected = load_file(GOLDEN / "nlsr_all_modules_transplanted.safetensors")
    for part in golden_found.modules:
        before, of_reference = subject.factors(part.module), reference.factors(part.module)
        assert part.masks is not None
        assert before is not None
        assert of_reference is not None
        after = transplanted_factors(before, of_reference, part.masks, part.module)
        A, B = of_factor(expected, part.module, "lora_A"), of_factor(expected, part.module, "lora_B")
        torch.testing.assert_close(after.A, A, atol=1e-6, rtol=0)
        torch.testing.assert_close(after.B, B, atol=1e-6, rtol=0)
        (edit,) = FactorEditor(subject, reference, part.module, part.masks).edits()
        assert edit.extension is not None
        assert torch.equal(edit.values @ torch.cat([before.A, edit.extension]), edit.values[:, 4:] @ after.A)
        torch.testing.assert_close(edit.values[:, 4:], B, atol=1e-6, rtol=0)


def test_a_factor_region_claims_every_neuron(golden_found) -> None:
    for part in golden_found.modules:
        assert torch.equal(part.selected, torch.arange(len(part.scores)))
        assert not len(part.already_protected)
