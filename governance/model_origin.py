"""What models say of themselves outside the registry: their name on the Hugging Face hub and their licence.

Read from the front matter of a `README.md` beside the weights, and from the place of a model in the hub's cache. None
of it is recorded or checked; it is passed on with the name of the model that said it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from governance.errors import InputError

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?<![.-])")
_CACHED = "models--"


@dataclass(frozen=True)
class ModelOrigin:
    """Where a patched model comes from, in the words of the models themselves.

    Attributes:
        base_model: the hub's name of what it derives from; None: not known.
        licence: fields for the front matter (`license`, `license_name`, `license_link`); empty: not known.
        licence_of: name of the registered model whose card states it.
    """

    base_model: str | None
    licence: Mapping[str, str]
    licence_of: str | None


def read_origin(
    models: Mapping[str, Path], *, subject: str, checkpoint: str | None, given: str | None = None
) -> ModelOrigin:
    """Read what the cards of a lineage's models say.

    Args:
        models: place of every model by its registered name, the nearest relation of the subject first.
        subject: the model that was patched.
        checkpoint: the one under it, if it is an adapter.
        given: the hub's name of what it derives from, if the user says so.

    Raises:
        InputError: what was given cannot be a name on the hub.
    """
    if given is not None and not _is_hub_name(given):
        raise InputError(f"{given[:100]!r} cannot name a model on the Hub", "give it as OWNER/NAME")
    cards = {name: _front_matter(place) for name, place in models.items()}
    named = _cached_name(models[checkpoint or subject]) or _stated_base(cards[subject])
    licences = ((name, _licence(cards[name])) for name in _by_kinship(models, subject, checkpoint))
    licence_of, licence = next(((name, found) for name, found in licences if found), (None, {}))
    return ModelOrigin(given or named, licence, licence_of)


def _by_kinship(models: Iterable[str], subject: str, checkpoint: str | None) -> list[str]:
    """The subject, then what it was made from: its licence stands for what is derived from it."""
    return list(dict.fromkeys([subject, *([checkpoint] if checkpoint else []), *models]))


def _front_matter(directory: Path) -> dict[str, Any]:
    """The front matter of a model's card; empty if there is none that can be read."""
    try:
        return metadata_load(directory / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file, which nobody asked us to read
        return {}


def _licence(card: Mapping[str, Any]) -> dict[str, str]:
    licence = card.get("license")
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        return {}
    fields = {name: card.get(name) for name in ("license_name", "license_link")}
    return {"license": licence} | {name: value for name, value in fields.items() if isinstance(value, str)}


def _stated_base(card: Mapping[str, Any]) -> str | None:
    stated = card.get("base_model")
    names = stated if isinstance(stated, list) else [stated]
    return names[0] if len(names) == 1 and isinstance(names[0], str) and _is_hub_name(names[0]) else None


def _cached_name(directory: Path) -> str | None:
    """OWNER/NAME of a snapshot in the hub's cache, `models--OWNER--NAME/snapshots/REVISION`."""
    if directory.parent.name != "snapshots" or not directory.parent.parent.name.startswith(_CACHED):
        return None
    name = directory.parent.parent.name.removeprefix(_CACHED).replace("--", "/")
    return name if _is_hub_name(name) else None


def _is_hub_name(name: str) -> bool:
    """Whether a name is OWNER/NAME, as the hub writes it; a path or a bare word is not."""
    return _HUB_NAME.fullmatch(name) is not None and not {"--", ".."} & {name[i : i + 2] for i in range(len(name))}
