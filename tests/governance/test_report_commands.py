"""The commands of a report are commands of this program, and give back the settings that were recorded."""

import re
import shlex
from dataclasses import replace
from datetime import timedelta
from typing import Any

import click
import pytest

from algorithms.methods import METHODS, method_of
from cli import main
from governance.commands.settings import GivenSettings, SettingsChoice
from governance.identification import settings_digest
from governance.provenance import OriginSummary
from governance.report_commands import apply_command, commands
from governance.report_records import ApprovalRecord, MeasurementRecord, PolicyRecord, PromptSetRecord, Report
from tests.governance.made_reports import START, made_identification, made_report

PRESETS = [(method, preset) for method, known in METHODS.items() for preset in known.presets]
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("fgsn", {"budget": 1e-05, "layers": "10..15", "modules": ("q_proj", "down_proj"), "window": 6}),
    ("fgsn", {"target": "full", "operation": "project"}),
    ("fgsn", {"target": "full", "operation": "project", "strength": 1.0, "entries": 0.5}),
    ("nlsr", {"reference": 'it\'s "super" [1]', "beta": 0.3, "selection": "threshold", "threshold": 0.25}),
    ("nlsr", {"reference": "2024", "modules": ("v_proj",)}),
    ("nlsr", {"reference": "true"}),
]


def understood(line: str) -> dict[str, Any]:
    """What the command line makes of a command; a command that it does not know fails."""
    program, *words = shlex.split(line)
    assert program == "neuronledger"
    command: click.Command = main
    context = click.Context(main, **main.context_settings)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        context = click.Context(command, parent=context, info_name=name)
    return command.make_context(command.name, words, parent=context.parent).params


def chosen(line: str) -> SettingsChoice:
    said = understood(line)
    given = GivenSettings(None, said["assignments"])
    return SettingsChoice(said["method"], said["preset"], said["reference"], given)


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_a_preset_is_named_and_nothing_else(method: str, preset: str) -> None:
    settings = method_of(method).choose(preset, {})
    record = made_identification(
        1, "animals", method, preset=preset, settings=settings.model_dump(mode="json"), settings_digest="f" * 64
    )
    command = apply_command("line", "animals", record, "why not")
    assert "--set" not in command.line
    assert "f" * 64 in command.note
    assert settings_digest(chosen(command.line).settings()) == settings_digest(settings)
    assert understood(command.line)["reason"] == "why not"


@pytest.mark.parametrize(("method", "changes"), CHANGES)
@pytest.mark.parametrize("preset", ["default", "fgsn-paper", None, "gone since"])
def test_changed_settings_are_given_back(method: str, changes: dict[str, Any], preset: str | None) -> None:
    known = preset if preset in METHODS[method].presets else "default"  # type: ignore[index]
    settings = method_of(method).choose(known, changes)
    record = made_identification(1, "animals", method, preset=preset, settings=settings.model_dump(mode="json"))
    command = apply_command("line", "animals", record)
    assert settings_digest(chosen(command.line).settings()) == settings_digest(settings)


def test_every_command_of_a_report_is_one_of_this_program() -> None:
    report = made_report(("animals", '<b>weapons & "more"', "child abuse"))
    lines = [command.line for command in commands(report) if command.line]
    for line in lines:
        understood(line)
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        "init",
        *["model register"] * 3,
        *["dimension register"] * 3,
        "lineage create",
        "evaluate line",
        "patch apply",
        "patch approve",
        *["patch apply"] * 3,
        "patch revert",
        "audit verify",
        "audit replay",
    ]


def test_dimensions_are_registered_as_they_were() -> None:
    source = PromptSetRecord(1, "harmful", "a", "x.jsonl", 9, "b" * 64, (("kind", "a b"),), ("q", "r"), "says", 50, 2)
    sets = (source, replace(source, identifier=2, purpose="benign", where=(("kind", "no"),)))
    report = replace(made_report(("a",)), prompt_sets=sets)
    (line,) = [command.line for command in commands(report) if "dimension register" in command.line]
    said = understood(line)
    assert (said["harmful"], said["benign"], said["heldout"]) == ("x.jsonl", "x.jsonl", None)
    assert (said["where"], said["benign_where"]) == (("kind=a b",), ("kind=no",))
    assert (said["prompt_column"], said["answer_column"]) == (("q", "r"), "says")
    assert (said["limit"], said["drop_duplicates"]) == (50, True)


def test_measurements_that_one_command_made_are_one_command() -> None:
    def measured(metric: str, dimension: str | None, stage: str, judge: str | None) -> MeasurementRecord:
        generation = {"max_new_tokens": 5 if judge is None else 9, "batch_size": 4}
        return MeasurementRecord(START, stage, metric, dimension, 1, judge, generation)

    runs = [
        [
            measured("harmfulness", "a", stage, "advbench-phrases 1"),
            measured("harmfulness_jailbreak", None, stage, "advbench-phrases 1"),
            measured("task_accuracy", None, stage, None),
            measured("over_refusal", None, stage, "advbench-phrases 1"),
        ]
        for stage in ("aligned", "patch 1", "patch 1")
    ]
    report = replace(made_report(("a",)), measurements=tuple(record for run in runs for record in run))
    found = [command for command in commands(report) if "evaluate" in command.line]
    assert [understood(command.line)["model"] for command in found] == ["aligned", "head", "head"]
    said = understood(found[0].line)
    assert said["dimensions"] == ("a",)
    assert said["accuracy"] == ("task=data/harmful.jsonl",)
    assert said["harmful"] == ("jailbreak=data/harmful.jsonl",)
    assert said["over_refusal"] == "data/harmful.jsonl"
    assert (said["max_new_tokens"], said["batch_size"]) == (9, 4)
    assert found[0].note == ""


def test_models_run_again_where_and_as_they_ran() -> None:
    def measured(dtype: str | None) -> MeasurementRecord:
        generation = {"max_new_tokens": 5} | ({} if dtype is None else {"dtype": dtype})
        return MeasurementRecord(START, "aligned", "harmfulness", "a", 1, "advbench-phrases 1", generation)

    report = replace(made_report(("a",)), measurements=(measured(None), measured("bfloat16")))
    found = [understood(command.line) for command in commands(report) if "evaluate" in command.line]
    assert [said["dtype"] for said in found] == ["float32", "bfloat16"]

    placed = {"device_map": "auto", "dtype": "bfloat16"}
    said = understood(apply_command("line", "a", replace(made_identification(1, "a", "fgsn"), ran=placed)).line)
    assert (said["device_map"], said["dtype"]) == ("auto", "bfloat16")
    by_file = apply_command("line", "a", replace(made_identification(1, "a", "fgsn"), ran={"device_map": {"": 0}}))
    assert understood(by_file.line)["device_map"] is None
    assert '--device-map FILE.json with {"": 0}' in by_file.note


def test_an_imported_patch_is_imported_again() -> None:
    report = made_report(("a",))
    origin = OriginSummary("there", "4", "b", "x", "", "", "x", "", "1", "9", "e" * 64)
    report = replace(report, patches=(replace(report.patches[0], origin=origin),))
    (command,) = [command for command in commands(report) if "patch import" in command.line]
    assert understood(command.line)["dimension"] == "a"
    assert "patch 4 as there exported it" in command.note


def test_what_happened_stands_in_the_order_of_time() -> None:
    report = made_report(("a", "b"))
    first, second = report.patches
    early = replace(first, reverted_at=START + timedelta(minutes=90), state="reverted")
    kinds = _patch_commands(replace(report, patches=(early, second)))
    assert kinds == ["apply a", "approve 1", "apply --planned", "revert 1", "apply b", "revert 2"]


def test_numbers_are_those_of_patches_that_were_applied_and_an_approval_waits_for_its_time() -> None:
    first, second, third = made_report(("a", "b", "c")).patches
    refused = replace(first, state="rejected", applied_at=None)
    approvals = tuple(
        ApprovalRecord(actor, decision, "why", START + timedelta(hours=2, minutes=number))
        for number, (actor, decision) in enumerate([("boss", "approved"), ("chief", "approved"), ("odd", "refused")])
    )
    waited = replace(second, approvals=approvals, applied_at=START + timedelta(hours=4))
    report = replace(made_report(("a", "b", "c")), patches=(refused, waited, third))
    found = [command for command in commands(report) if command.line.startswith("neuronledger patch")]
    assert _patch_commands(report) == [
        "apply b",
        *["approve 1"] * 2,
        "apply c",
        "revert 2",
        "apply --planned",
    ]
    assert found[1].note == "by another actor than the patch's; it was boss"
    assert (found[4].note, found[5].note) == ("it was patch 3", "it was patch 2")
    assert understood(found[5].line)["planned"] == 1


def test_policies_are_set_when_they_were() -> None:
    policies = (
        PolicyRecord(START, "all", 1, "a" * 64, everywhere=True),
        PolicyRecord(START + timedelta(minutes=90), "own", 2, "b" * 64, everywhere=False),
    )
    found = commands(replace(made_report(("a", "b")), policies=policies, measurements=()))
    lines = [command.line for command in found]
    everywhere, own = (lines.index(line) for line in lines if "policy set" in line)
    assert understood(lines[everywhere])["lineage"] is None
    assert understood(lines[own])["lineage"] == "line"
    assert everywhere < lines.index(next(line for line in lines if "apply line a" in line)) < own
    assert own < lines.index(next(line for line in lines if "apply line b" in line))
    assert f"policy own version 2, digest {'b' * 64}" in found[own].note


def test_what_was_kept_of_a_file_is_kept_again() -> None:
    files = tuple(
        PromptSetRecord(number, "evaluation", None, f"{number}.jsonl", 9, "b" * 64, limit=limit, dropped=dropped)
        for number, limit, dropped in ((1, None, 0), (2, 50, 3))
    )
    measured = tuple(
        MeasurementRecord(START, stage, "kl_base", None, number, None, {"against": "base"})
        for number, stage in ((1, "subject"), (2, "aligned"))
    )
    report = replace(made_report(("a",)), prompt_sets=files, measurements=measured)
    said = [understood(command.line) for command in commands(report) if "evaluate" in command.line]
    assert [(each["kl"], each["drop_duplicates"], each["limit"]) for each in said] == [
        ("1.jsonl", False, None),
        ("2.jsonl", True, 50),
    ]


def _patch_commands(report: Report) -> list[str]:
    found = (re.match(r"neuronledger patch (\w+) line (\S+)", command.line) for command in commands(report))
    return [f"{match[1]} {match[2]}" for match in found if match]
