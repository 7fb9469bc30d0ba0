"""Settings of NLSR: what is refused, what is warned about, and that a recorded run can be read back."""

import json

import pytest

from algorithms.errors import SettingsError
from algorithms.nlsr_settings import NLSR_PRESETS, NlsrSettings, nlsr_settings


def test_every_field_is_described_in_a_sentence() -> None:
    for name, field in NlsrSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("preset", sorted(NLSR_PRESETS))
def test_a_preset_survives_json(preset: str) -> None:
    recorded = json.loads(NLSR_PRESETS[preset].model_dump_json())
    assert NlsrSettings.model_validate(recorded) == NLSR_PRESETS[preset] == nlsr_settings(preset)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"tokens": "answer+footer"}, "'footer'"),
        ({"layers": "9..3"}, "names no set of blocks"),
        ({"layers": "window"}, "names no set of blocks"),
        ({"selection": "threshold"}, "has no threshold"),
        ({"kept_probability": 0.1}, "leaves the range 0 to 1"),
        ({"kept_probability": 0.9, "selection": "published-code"}, "leaves the range 0 to 1"),
        ({"form": "factor", "region_of": "weight"}, "factors of the update"),
        ({"sparsity": 1}, "setting sparsity"),
        ({"beta": -0.1}, "setting beta"),
        ({"colour": "red"}, "setting colour"),
    ],
)
def test_nonsense_is_refused_with_its_name(overrides: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        nlsr_settings("default", overrides)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SettingsError, match="no preset 'best'"):
        nlsr_settings("best")


def test_defaults_are_the_published_numbers_in_the_neuron_form() -> None:
    chosen = nlsr_settings("default", {"modules": ["q_proj"], "sparsity": "0.8"})
    assert (chosen.beta, chosen.sparsity, chosen.kept_probability, chosen.epsilon) == (0.9, 0.8, 0.5, 0.2)
    assert (chosen.form, chosen.selection, chosen.tokens, chosen.modules) == (
        "neuron",
        "bernoulli",
        "answer",
        ("q_proj",),
    )


def test_a_probability_range_binds_only_where_something_is_drawn() -> None:
    assert nlsr_settings("default", {"selection": "all", "kept_probability": 0.0}).kept_probability == 0.0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({}, "can break the reference"),
        ({"mode": "published-code"}, "by 3.24"),
        ({"selection": "published-code"}, "opposite of what the paper"),
        ({"rank_rule": "published-code"}, "share of the rank that the paper removes"),
        ({"epsilon": 0}, "same chance"),
        ({"form": "factor"}, "claims them all"),
    ],
)
def test_what_a_user_should_know_is_said(overrides: dict[str, object], sentence: str) -> None:
    assert any(sentence in warning for warning in nlsr_settings("default", overrides).warnings())


def test_mild_settings_warn_of_nothing() -> None:
    assert nlsr_settings("default", {"beta": 0.3}).warnings() == ()


def test_blocks_and_tokens_are_read() -> None:
    chosen = nlsr_settings("default", {"layers": "2..5", "tokens": "answer + header"})
    assert chosen.block_range == (2, 5)
    assert chosen.tokens == "header+answer"
    assert chosen.token_kinds == {"header", "answer"}
    assert nlsr_settings().block_range is None


def test_a_pass_is_needed_only_for_scores_that_measure() -> None:
    needed = {
        score: NlsrSettings(region_score=score).needs_pass for score in ("low-rank", "wanda", "magnitude", "random")
    }
    assert needed == {"low-rank": True, "wanda": True, "magnitude": False, "random": False}
