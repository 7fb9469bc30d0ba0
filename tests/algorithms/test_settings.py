"""Settings: what is refused, what defaults to what, and that a recorded run can be read back."""

import json

import pytest

from algorithms.errors import SettingsError
from algorithms.settings import PRESETS, FgsnSettings, fgsn_settings


def test_every_field_is_described_in_a_sentence() -> None:
    for name, field in FgsnSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_survives_json(preset: str) -> None:
    recorded = json.loads(PRESETS[preset].model_dump_json())
    assert FgsnSettings.model_validate(recorded) == PRESETS[preset] == fgsn_settings(preset)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"tokens": "answer+footer"}, "'footer'"),
        ({"layers": "9..3"}, "names no set of blocks"),
        ({"layers": "some"}, "names no set of blocks"),
        ({"score": "update-norm", "selection": "difference"}, "no benign side"),
        ({"score": "wanda", "damage_baseline": "minus"}, "no meaning for score wanda"),
        ({"score": "attribution", "tokens": "prompt+header"}, "counts none"),
        ({"score": "attribution", "selection": "difference"}, "no benign ranking"),
        ({"score": "damage", "benign_weight": 0.5}, "no meaning for score damage"),
        ({"ranking": "module"}, "stop_at = 1.25"),
        ({"gradient_models": "head"}, "stop_at = 1.25"),
        ({"target": "full"}, "no meaning for operation restore"),
        ({"budget": 0}, "setting budget"),
        ({"strength": 1.5}, "setting strength"),
        ({"colour": "red"}, "setting colour"),
        ({"score": "luck"}, "setting score"),
    ],
)
def test_nonsense_is_refused_with_its_name(overrides: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        fgsn_settings("default", overrides)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SettingsError, match="no preset 'best'"):
        fgsn_settings("best")


def test_strings_from_the_command_line_are_converted() -> None:
    chosen = fgsn_settings("default", {"budget": "0.2", "directions": "8", "modules": ["q_proj"]})
    assert (chosen.budget, chosen.directions, chosen.modules) == (0.2, 8, ("q_proj",))


def test_a_full_target_is_gentle_unless_told_otherwise() -> None:
    assert fgsn_settings("fgsn-paper", {"target": "full"}).strength == 0.2
    assert fgsn_settings("fgsn-paper", {"target": "full", "strength": 0.9}).strength == 0.9
    assert fgsn_settings("fgsn-paper").strength == 1.0


def test_tokens_are_kept_in_one_order() -> None:
    chosen = fgsn_settings("default", {"tokens": "answer + prompt"})
    assert chosen.tokens == "prompt+answer"
    assert chosen.token_kinds == {"prompt", "answer"}


def test_a_block_range_includes_both_ends() -> None:
    assert fgsn_settings("default", {"layers": "10..15"}).block_range == (10, 15)
    assert fgsn_settings("default").block_range is None


def test_risky_settings_warn() -> None:
    assert not PRESETS["default"].warnings()
    assert any("overlap" in warning for warning in PRESETS["fgsn-paper"].warnings())
    full_target = fgsn_settings("fgsn-paper", {"target": "full"})
    assert any("collapse" in warning for warning in full_target.warnings())


@pytest.mark.parametrize(
    ("overrides", "harmful", "benign"),
    [
        ({}, True, False),
        ({"benign_weight": 0.5}, True, True),
        ({"operation": "subspace"}, True, False),
        ({"protect": "directions", "operation": "subspace"}, True, False),
        ({"score": "damage"}, True, True),
        ({"score": "damage", "tokens": "prompt"}, False, False),
        ({"score": "random"}, False, False),
    ],
)
def test_answers_are_asked_for_where_something_looks_at_them(
    overrides: dict[str, object], harmful: bool, benign: bool
) -> None:
    settings = fgsn_settings("default", overrides)
    assert (settings.needs_answers, settings.needs_benign_answers) == (harmful, benign)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"foo": 1}, "setting foo: there is no such setting. The reference page of the settings lists every one."),
        ({"layer": "all"}, "setting layer: there is no such setting. Use layers"),
        ({"modules": "foo"}, "setting modules: 'foo' is not a list. Write one, as in --set 'modules=[\"foo\"]'."),
        (
            {"modules": "[a, b]"},
            "setting modules: '[a, b]' is not a list. Write one, as in --set 'modules=[\"a\", \"b\"]'.",
        ),
        ({"modules": [3]}, "setting modules.0: 3 is not a text. Write it in quotes, as in --set 'modules=[\"3\"]'."),
        ({"layers": 9}, "setting layers: 9 is not a text. Write it in quotes, as in --set 'layers=\"9\"'."),
    ],
)
def test_a_mistake_is_told_in_words_of_the_command_line(overrides: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        fgsn_settings("default", overrides)
    assert str(refusal.value).startswith(told)
