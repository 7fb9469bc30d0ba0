"""The commands that would do to other copies of the models what was done to this lineage."""

import json
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from algorithms.errors import SettingsError
from algorithms.methods import METHODS, method_of
from governance.metrics import LM_EVAL
from governance.report_records import (
    IdentificationRecord,
    MeasurementRecord,
    PatchRecord,
    PolicyRecord,
    PromptSetRecord,
    Report,
)

_ROLE_ORDER = ("base", "aligned", "subject")
_PHRASES = "advbench-phrases"


@dataclass(frozen=True)
class Command:
    """One line for a shell; an empty `line` stands for what no command can do. The note says what to look out for."""

    line: str
    note: str = ""


def commands(report: Report) -> tuple[Command, ...]:
    """Every command from an empty registry to the head, in the order in which it was done."""
    sets = {record.identifier: record for record in report.prompt_sets}
    return (
        Command(_line("init")),
        *_models(report),
        *_dimensions(report),
        Command(
            _line(
                *("lineage", "create", report.lineage, "--subject", report.subject.name),
                *("--aligned", report.models[1].name, "--base", report.models[2].name),
            )
        ),
        *_history(report, sets),
        Command(_line("audit", "verify", "--weights", "--lineage", report.lineage)),
        Command(_line("audit", "replay", report.lineage), "rebuilds the head from the subject and the artifacts"),
    )


def apply_command(lineage: str, dimension: str, record: IdentificationRecord, reason: str = "") -> Command:
    """The command that identifies and patches with the settings of an identification."""
    options, note = _settings(record)
    places, where = _placement(record.ran)
    notes = [f"its settings have the digest {record.settings_digest}", *(each for each in (note, where) if each)]
    return Command(_line("patch", "apply", lineage, dimension, *options, *places, *_because(reason)), "; ".join(notes))


def _placement(ran: Mapping[str, Any]) -> tuple[list[str], str]:
    """Options that have models run where and in which format they ran, and a note where options cannot say it."""
    options = ["--dtype", str(ran["dtype"])] if "dtype" in ran else []
    place = ran.get("device_map")
    if isinstance(place, dict):
        return options, f"models were placed by --device-map FILE.json with {json.dumps(place)}"
    return options + (["--device-map", str(place)] if place else []), ""


def _line(*words: str) -> str:
    return shlex.join(["neuronledger", *words])


def _models(report: Report) -> list[Command]:
    found: dict[str, Command] = {}
    under = {model.role.removeprefix("base of "): model.name for model in report.models if " of " in model.role}
    checkpoints = [model for model in report.models if " of " in model.role]
    own = {model.role: model for model in report.models if model.role in _ROLE_ORDER}
    for model in (*checkpoints, *(own[role] for role in _ROLE_ORDER)):
        role = model.role if model.role in _ROLE_ORDER else "base"
        base = ["--base-model", under[model.name]] if model.name in under else []
        words = ("model", "register", model.name, "DIRECTORY", "--role", role, *base)
        found.setdefault(model.name, Command(_line(*words), f"its weights have the digest {model.state_digest}"))
    return list(found.values())


def _dimensions(report: Report) -> list[Command]:
    found = []
    for name in report.dimensions:
        own = {record.purpose: record for record in report.prompt_sets if record.dimension == name}
        if not {"harmful", "benign"} <= own.keys():
            found.append(Command("", f"dimension {name}: its prompt sets are not recorded here"))
            continue
        words = ["dimension", "register", name]
        for purpose in ("harmful", "benign", "heldout"):
            words += [f"--{purpose}", own[purpose].source] if purpose in own else []
        words += _repeated("--where", (f"{field}={value}" for field, value in own["harmful"].where))
        words += _repeated("--benign-where", (f"{field}={value}" for field, value in own["benign"].where))
        words += _repeated("--prompt-column", own["harmful"].prompt_columns)
        answers = own["harmful"].answer_column or own["benign"].answer_column
        words += ["--answer-column", answers] if answers else []
        words += ["--drop-duplicates"] if any(record.dropped for record in own.values()) else []
        limit = own["harmful"].limit
        words += ["--limit", str(limit)] if limit is not None else []
        digests = ", ".join(f"set {record.identifier} {purpose}" for purpose, record in own.items())
        found.append(Command(_line(*words), f"digests of what is read: {digests} in the table of prompt sets"))
    return found


def _history(report: Report, sets: dict[int, PromptSetRecord]) -> list[Command]:
    """Policies, patches that were applied, reverts and measurements by time."""
    records = {record.identification: record for record in report.identifications}
    applied = [patch for patch in report.patches if patch.applied_at is not None]
    done = [(policy.at, _policy(report.lineage, policy)) for policy in report.policies]
    for number, patch in enumerate(applied, start=1):
        done += _patched(report.lineage, number, patch, records.get(patch.identification))
    done += [(run[0].at, _measured(report.lineage, run, sets)) for run in _runs(report.measurements)]
    return [command for _, command in sorted(done, key=lambda pair: _utc(pair[0]))]


def _policy(lineage: str, policy: PolicyRecord) -> Command:
    of = [] if policy.everywhere else ["--lineage", lineage]
    note = f"FILE is policy {policy.name} version {policy.version}, digest {policy.digest}; an evidence pack holds it"
    return Command(_line("policy", "set", "FILE", *of), note)


def _patched(
    lineage: str, number: int, patch: PatchRecord, record: IdentificationRecord | None
) -> Iterator[tuple[datetime, Command]]:
    """What a patch took; `number` is the one that it gets where patches that were never applied are not repeated."""
    note = f"it was patch {patch.patch}" if number != patch.patch else ""
    approvals = [each for each in patch.approvals if each.decision == "approved"]
    if patch.applied_at is not None:
        yield (patch.created_at if approvals else patch.applied_at), _applied(lineage, patch, record)
        for each in approvals:
            words = ("patch", "approve", lineage, str(number), *_because(each.reason))
            yield each.created_at, Command(_line(*words), f"by another actor than the patch's; it was {each.actor}")
        if approvals:
            yield patch.applied_at, Command(_line("patch", "apply", lineage, "--planned", str(number)), note)
    if patch.reverted_at is not None:
        words = ("patch", "revert", lineage, str(number), *_because(patch.revert_reason))
        yield patch.reverted_at, Command(_line(*words), note)


def _applied(lineage: str, patch: PatchRecord, record: IdentificationRecord | None) -> Command:
    if patch.origin is not None:
        words = ("patch", "import", lineage, "FILE", "--dimension", patch.dimension)
        return Command(_line(*words), f"FILE is patch {patch.origin.patch} as {patch.origin.lineage} exported it")
    if record is None:
        return Command("", f"patch {patch.patch}: its identification is not recorded")
    return apply_command(lineage, patch.dimension, record, patch.reason)


def _because(reason: str) -> list[str]:
    return ["--reason", reason] if reason else []


def _settings(record: IdentificationRecord) -> tuple[list[str], str]:
    """Options that give the settings of an identification again: its preset and what differs from it."""
    options = [] if record.method == "fgsn" else ["--method", record.method]
    presets = method_of(record.method).presets if record.method in METHODS else {}
    preset = record.preset if record.preset and record.preset in presets else "default"
    if preset != "default":
        options += ["--preset", preset]
    try:
        changed = _changed(record.method, preset, record.settings, {})
        changed |= _changed(record.method, preset, record.settings, changed)  # what a default makes of the others
    except SettingsError as error:
        return options, f"this version does not take its settings: {error.problem}"
    options += _repeated("--set", (f"{name}={_toml(value)}" for name, value in changed.items() if value is not None))
    absent = [name for name, value in changed.items() if value is None]
    return options, f"leave out {', '.join(absent)}, which the command line cannot" if absent else ""


def _changed(method: str, preset: str, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The recorded settings that a preset with the `given` ones would not give."""
    found = method_of(method).choose(preset, given).model_dump(mode="json")
    return {name: value for name, value in settings.items() if name not in found or found[name] != value}


def _toml(value: Any) -> str:
    """A value as `--set` reads it: TOML, or plain text where that is no TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _is_text(value) else _quoted(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_quoted(one) if isinstance(one, str) else _toml(one) for one in value) + "]"
    return repr(value)


def _quoted(text: str) -> str:
    """A TOML string: its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _is_text(value: str) -> bool:
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value == value.strip()
    return False


def _runs(measurements: Sequence[MeasurementRecord]) -> list[list[MeasurementRecord]]:
    """Measurements that one command made: the same stage and number format, one after the other, no quantity twice."""
    runs: list[list[MeasurementRecord]] = []
    for record in measurements:
        run = runs[-1] if runs else []
        seen = {(one.metric, one.dimension, one.judge) for one in run}
        alike = bool(run) and (run[0].stage, _dtype(run[0])) == (record.stage, _dtype(record))
        if alike and (record.metric, record.dimension, record.judge) not in seen:
            run.append(record)
        else:
            runs.append([record])
    return runs


def _dtype(record: MeasurementRecord) -> str:
    return str(record.generation.get("dtype", ""))


def _measured(lineage: str, run: Sequence[MeasurementRecord], sets: dict[int, PromptSetRecord]) -> Command:
    stage = run[0].stage
    tasks = sorted(one.metric.removeprefix(LM_EVAL) for one in run if one.metric.startswith(LM_EVAL))
    if len(tasks) == len(run):
        return Command("", f"measured with lm-eval at {stage}: {', '.join(task.strip('_') for task in tasks)}")
    words = ["evaluate", lineage]
    words += ["--model", stage] if stage in _ROLE_ORDER else []
    words += _repeated("--dimension", dict.fromkeys(one.dimension for one in run if one.dimension))
    columns: dict[str, None] = {}
    for one in run:
        held = sets.get(one.prompt_set) if one.prompt_set is not None else None
        place = held.source if held else "FILE"
        if one.dimension is None:
            columns |= dict.fromkeys(held.prompt_columns if held else ())
        if one.metric.endswith("_accuracy"):
            name, scorer = one.metric.removesuffix("_accuracy"), one.generation.get("scorer", "prefix")
            words += ["--accuracy", f"{name}={place}"]
            words += ["--scorer", f"{name}={scorer}"] if scorer != "prefix" else []
        elif "against" in one.generation:
            words += ["--kl", place, "--against", str(one.generation["against"])]
        elif one.metric == "over_refusal":
            words += ["--over-refusal", place]
        elif one.dimension is None and one.metric.startswith("harmfulness_"):
            named = ["--harmful", f"{one.metric.removeprefix('harmfulness_')}={place}"]
            words += named if named[1] not in words else []
    words += _repeated("--prompt-column", columns)
    others = [sets[one.prompt_set] for one in run if one.dimension is None and one.prompt_set in sets]
    words += ["--drop-duplicates"] if any(held.dropped for held in others) else []
    limits = [held.limit for held in others if held.limit is not None]
    words += ["--limit", str(max(limits))] if limits else []
    lengths = [one.generation["max_new_tokens"] for one in run if "max_new_tokens" in one.generation]
    words += ["--max-new-tokens", str(max(lengths))] if lengths else []
    sizes = [size for one in run if isinstance(size := one.generation.get("batch_size"), int)]
    words += ["--batch-size", str(sizes[0])] if sizes else []
    ran: dict[str, Any] = {
        key: one.generation[key] for one in run for key in ("dtype", "device_map") if key in one.generation
    }
    places, where = _placement(ran)
    judges = dict.fromkeys(one.judge for one in run if one.judge and not one.judge.startswith(_PHRASES))
    note = f"was judged by {', '.join(judges)}: phrases go to --refusal-phrase, others to --judge" if judges else ""
    return Command(_line(*words, *places), "; ".join(each for each in (note, where) if each))


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
