"""Which judge a name stands for: `phrases`, `classifier:PATH`, `generative:PATH`, `endpoint:MODEL`,
`trained:NAME` (a judge that was trained here), or a settings file.

A settings file (`.toml`) holds `judge = "KIND:WHAT"` and settings of that kind.
"""

import hashlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from algorithms.classifier_judge import ClassifierJudge
from algorithms.generative_judge import GenerativeJudge
from algorithms.judge_settings import ClassifierSettings, EndpointSettings, GenerativeSettings, JudgeSettings
from algorithms.judges import Judge, RefusalPhraseJudge
from governance.endpoint_judge import EndpointJudge
from governance.errors import JudgeError
from governance.judges import open_judge
from governance.workspace import Workspace

_MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_SHORT = 12
_Settings = TypeVar("_Settings", bound=JudgeSettings)


def choose_judge(workspace: Workspace, name: str, phrases: RefusalPhraseJudge) -> Judge:
    """The judge that a name stands for. Models are loaded only when they judge.

    Args:
        workspace: where trained judges are registered, and on which devices the others run, in float32.
        name: as the module says.
        phrases: what `phrases` stands for.

    Raises:
        JudgeError: there is no such kind, model or file, or a setting is none or out of range.
    """
    given: dict[str, Any] = {}
    if name.endswith(".toml"):
        name, given = _read(Path(name))
    if name == "phrases":
        _require_none(name, given)
        return phrases
    kind, _, what = name.partition(":")
    if kind not in _KINDS or not what:
        forms = ", ".join(["phrases", *(f"{known}:…" for known in _KINDS), "FILE.toml"])
        raise JudgeError(f"there is no judge {name!r}", f"choose among {forms}")
    return _KINDS[kind](workspace, what, given)


def _classifier(workspace: Workspace, what: str, given: Mapping[str, Any]) -> Judge:
    path, settings = _directory(what), _validated(ClassifierSettings, what, given)
    digest, devices = settings.digest(_digest_of(path)), workspace.placement.devices()
    return ClassifierJudge(path, settings, f"classifier {_shown(what)}", digest[:_SHORT], digest, devices)


def _generative(workspace: Workspace, what: str, given: Mapping[str, Any]) -> Judge:
    path, settings = _directory(what), _validated(GenerativeSettings, what, given)
    digest, devices = settings.digest(_digest_of(path)), workspace.placement.devices()
    return GenerativeJudge(path, settings, f"generative {_shown(what)}", digest[:_SHORT], digest, devices)


def _endpoint(workspace: Workspace, what: str, given: Mapping[str, Any]) -> Judge:
    del workspace
    settings = _validated(EndpointSettings, what, given)
    digest = settings.digest(what)
    return EndpointJudge(what, settings, f"endpoint {what}", digest[:_SHORT], digest)


def _trained(workspace: Workspace, what: str, given: Mapping[str, Any]) -> Judge:
    _require_none(f"trained:{what}", given)
    return open_judge(workspace, what)


_KINDS: Mapping[str, Callable[[Workspace, str, Mapping[str, Any]], Judge]] = MappingProxyType(
    {"classifier": _classifier, "generative": _generative, "endpoint": _endpoint, "trained": _trained}
)


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise JudgeError(
            f"{file} cannot be read ({error.strerror})", "check the path of the judge's settings"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JudgeError(f"{file} is not TOML ({error})", "mend the judge's settings") from error
    name = content.pop("judge", None)
    if not isinstance(name, str):
        raise JudgeError(f"{file} names no judge", 'write judge = "classifier:PATH" into it')
    return name, content


def _validated(settings: type[_Settings], what: str, given: Mapping[str, Any]) -> _Settings:
    try:
        return settings.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        known = ", ".join(settings.model_fields)
        raise JudgeError(f"the judge {what}: {place}: {first['msg']}", f"its settings are {known}") from error


def _require_none(name: str, given: Mapping[str, Any]) -> None:
    if given:
        raise JudgeError(f"the judge {name} has no setting {next(iter(given))}", "take it out of the file")


def _directory(what: str) -> Path:
    """The directory of a judge's model: as given, or fetched from the hub by `owner/name`."""
    path = Path(what).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or what.startswith((".", "~")) or what.count("/") != 1:
        raise JudgeError(f"there is no directory {what}", "give the directory of a model, or owner/name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(what, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise JudgeError(
            f"{what} is neither a directory here nor a model that can be fetched ({type(error).__name__})",
            "check the path or the model's name on the hub, and that you are allowed to fetch it",
        ) from error


def _digest_of(path: Path) -> str:
    """SHA-256 of the names and contents of a model's files."""
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise JudgeError(f"{path} holds no safetensors file", "save the judge with save_pretrained")
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return whole.hexdigest()


def _shown(what: str) -> str:
    """The name in records: where a model lies on somebody's disk is not for a page to hand on."""
    path = Path(what).expanduser()
    return (path.resolve().name if path.is_dir() else what)[-200:]
