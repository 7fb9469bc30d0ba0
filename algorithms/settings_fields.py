"""What all settings share: fields that are read alike, and how presets, values and mistakes become settings."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from algorithms.errors import SettingsError

TOKEN_KINDS = ("prompt", "header", "answer")
_BLOCK_RANGE = re.compile(r"(\d+)\.\.(\d+)")

SettingsModel = TypeVar("SettingsModel", bound=BaseModel)


def _in_order(tokens: str) -> str:
    parts = {part.strip() for part in tokens.split("+")}
    if not parts <= set(TOKEN_KINDS):
        unknown = ", ".join(sorted(repr(part) for part in parts - set(TOKEN_KINDS)))
        raise SettingsError(
            f"tokens = {tokens!r} names {unknown}", "Join any of prompt, header and answer with +, as header+answer"
        )
    return "+".join(kind for kind in TOKEN_KINDS if kind in parts)


Tokens = Annotated[str, AfterValidator(_in_order)]
"""Kinds of token joined by +, kept in the order of `TOKEN_KINDS`."""


def block_range(layers: str) -> tuple[int, int] | None:
    """First and last block of an explicit range such as `10..15`, both included; None for the name of a scope."""
    found = _BLOCK_RANGE.fullmatch(layers)
    return (int(found[1]), int(found[2])) if found else None


def known_layers(layers: str, names: tuple[str, ...]) -> str:
    """The setting without white space around it.

    Args:
        layers: the setting.
        names: scopes that have a name.

    Raises:
        SettingsError: it is neither one of the names nor a range that ascends.
    """
    layers = layers.strip()
    explicit = block_range(layers)
    if layers not in names and (explicit is None or explicit[0] > explicit[1]):
        raise SettingsError(
            f"layers = {layers!r} names no set of blocks", f"Use {', '.join(names)} or a range such as 10..15"
        )
    return layers


def preset_settings(
    presets: Mapping[str, SettingsModel], preset: str, overrides: Mapping[str, Any] | None
) -> SettingsModel:
    """Settings of a preset with some fields replaced.

    Args:
        presets: settings by name.
        preset: a key of `presets`.
        overrides: field names and values (strings are converted as pydantic converts them).

    Raises:
        SettingsError: no such preset or field, a value out of range, or fields that contradict each other.
    """
    if preset not in presets:
        raise SettingsError(f"there is no preset {preset!r}", f"Use one of {', '.join(sorted(presets))}")
    chosen = presets[preset]
    return settings_of(type(chosen), chosen.model_dump(exclude_unset=True) | dict(overrides or {}))


def settings_of(model: type[SettingsModel], values: Mapping[str, Any]) -> SettingsModel:
    """Settings with these fields; a mistake is named in one line.

    Raises:
        SettingsError: no such field, a value out of range, or fields that contradict each other.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as invalid:
        raise _told(model, invalid.errors()[0]) from invalid


def _told(model: type[BaseModel], mistake: ErrorDetails) -> SettingsError:
    """A mistake in one line, with how it is written rightly."""
    name = ".".join(str(part) for part in mistake["loc"]) or "settings"
    setting, given = name.partition(".")[0], mistake.get("input")
    mend = "Correct it; the reference page of the settings lists every field with its range"
    match mistake["type"]:
        case "extra_forbidden":
            near = get_close_matches(name, model.model_fields, n=3, cutoff=0.5)
            return SettingsError(
                f"setting {name}: there is no such setting",
                f"Use {' or '.join(near)}" if near else "The reference page of the settings lists every one",
            )
        case "tuple_type":
            entries = given.strip("[] ").split(",") if isinstance(given, str) else ["q_proj"]
            written = ", ".join(f'"{entry.strip()}"' for entry in entries)
            return SettingsError(
                f"setting {name}: {given!r} is not a list", f"Write one, as in --set '{setting}=[{written}]'"
            )
        case "string_type":
            written = f'"{given}"' if len(mistake["loc"]) == 1 else f'["{given}"]'
            return SettingsError(
                f"setting {name}: {given!r} is not a text", f"Write it in quotes, as in --set '{setting}={written}'"
            )
    return SettingsError(f"setting {name}: {mistake['msg']} (got {given!r})", mend)
