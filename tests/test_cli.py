"""The command line itself: it answers at once, every command explains itself, every list can be read by programs."""

import csv
import io
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import neuronledger
from algorithms.methods import METHODS
from algorithms.probes import FitSettings
from cli import main
from governance.harness import HarnessFigure
from governance.judge_training import JudgeRequest, train_judge
from governance.labelled_rows import LabelledSource
from governance.patching import apply_patch
from governance.planning import plan_patch
from registry.database import Registry
from tests.databases import SQLiteDatabases
from tests.governance.labelled import labelled_rows, write_labelled
from tests.governance.policed import put_in_force
from tests.governance.scenarios import Scenario, Trio, build, write_prompts
from tests.tiny_models import save_model, save_variant

ROOT = Path(neuronledger.__file__).parent
HEAVY = ("torch", "sqlalchemy", "transformers", "peft", "numpy", "datasets", "alembic", "pydantic", "rich")


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, (*path, name))


COMMANDS = dict(_commands(main))
LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}
LISTS = {path for path, command in LEAVES.items() if any("--csv" in option.opts for option in command.params)}


def _python(*arguments: str) -> tuple[float, str]:
    """Processor seconds of a Python process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_help_takes_less_than_a_fifth_of_a_second() -> None:
    """Processor time, the best of three: the machine may be busy with other things."""
    best = min(_python("-m", "cli", "--help")[0] for _ in range(3))
    assert best < 0.2


def test_starting_and_helping_import_nothing_heavy() -> None:
    program = (
        "import sys, cli\n"
        "for command in ('', 'patch apply', 'model', 'align', 'identify', 'audit verify', 'demo'):\n"
        "    try:\n"
        "        cli.main([*command.split(), '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "print('LOADED', *sys.modules)"
    )
    loaded = set(_python("-c", program)[1].rpartition("LOADED")[2].split())
    assert "cli" in loaded
    assert "governance.commands.patch" in loaded
    assert not loaded & set(HEAVY)


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"neuronledger, version {neuronledger.__version__}\n")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "neuronledger")
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    assert len(command.help.splitlines()[0]) > 15
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(main, [*path, flag])
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")
        assert command.help.splitlines()[0].split(".")[0].split()[0] in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("path", [("identify",), ("patch", "plan"), ("patch", "apply")], ids=" ".join)
def test_help_names_every_preset(path: tuple[str, ...]) -> None:
    (option,) = (option for option in COMMANDS[path].params if "--preset" in option.opts)
    assert isinstance(option, click.Option)
    named = set(re.findall(r"[a-z-]+", option.help or ""))
    assert {name for method in METHODS.values() for name in method.presets} <= named


def test_concern_is_dimension() -> None:
    def shown(word: str) -> str:
        return CliRunner().invoke(main, [word, "register", "--help"]).stdout.replace(f"main {word}", "main dimension")

    assert shown("concern") == shown("dimension")
    assert "concern" not in main.list_commands(click.Context(main))


def test_a_group_without_a_command_shows_its_help() -> None:
    for path, command in COMMANDS.items():
        if isinstance(command, click.Group):
            result = CliRunner().invoke(main, list(path))
            assert result.exit_code == 2
            assert "Commands:" in result.output


@pytest.mark.parametrize("arguments", [["--nope"], ["nope"], ["patch", "nope"], ["patch", "show", "x", "one"]])
def test_a_mistyped_command_is_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("neuronledger: ")
    assert result.stderr.endswith("--help.\n")
    assert result.stderr.count("\n") == 1


def test_every_command_that_prints_records_has_json_and_every_list_csv() -> None:
    writing_files = {("audit", "report"), ("model", "merge")}
    for path, command in LEAVES.items():
        options = {name for option in command.params for name in option.opts}
        assert "--json" in options or path in writing_files, path
    assert {path for path in LEAVES if path[-1] in {"list", "log"}} <= LISTS
    assert ("evaluate",) in LISTS


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, sqlite_databases: SQLiteDatabases) -> Iterator[Scenario]:
    """A registry with everything that can be listed."""
    from governance.workspace import Workspace

    place = tmp_path_factory.mktemp("commands")
    base = save_model(place / "base")
    aligned = save_variant(base, place / "aligned", seed=1)
    trio = Trio(save_variant(aligned, place / "subject", seed=2), aligned, base)
    with Registry.open(sqlite_databases.migrated(place / "registry")) as registry:
        scenario = build(Workspace(registry=registry, actor="tester"), trio, write_prompts(place / "prompts"))
        scenario.identify("weapons")
        found = scenario.identify("animals")
        apply_patch(scenario.workspace, plan_patch(scenario.workspace, "line", found.identification), 'a, "b"\nc')
        rows = write_labelled(place / "labelled.jsonl", labelled_rows())
        request = JudgeRequest(LabelledSource(str(rows)), str(base), fit=FitSettings(1, 4, 1), dtype="float32")
        train_judge(scenario.workspace, "probe", request)
        put_in_force(scenario.workspace, place, "[approvals]\nneeded = 1\n")
        yield scenario


def _run(scenario: Scenario, *arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


LIST_ARGUMENTS: dict[tuple[str, ...], list[str]] = {
    ("model", "list"): [],
    ("dimension", "list"): [],
    ("lineage", "list"): [],
    ("patch", "list"): ["line"],
    ("judge", "list"): [],
    ("policy", "list"): [],
    ("audit", "log"): [],
    ("audit", "heads"): [],
    ("audit", "neuron"): ["line", "layers.0.mlp.up_proj", "NEURON"],
    ("audit", "at"): ["2100-01-01"],
    ("audit", "diff"): ["line", "subject", "head"],
    ("audit", "overlap"): ["line"],
    ("audit", "capacity"): ["line", "--by", "kind"],
    ("evaluate",): ["line", "--max-new-tokens", "2", "--dimension", "animals"],
    ("utility",): ["line", "task"],
}

LIST_WITHIN = {("audit", "neuron"): "history", ("audit", "diff"): "modules"}
"""Commands whose JSON is an object with the list that their CSV is."""


def _arguments(scenario: Scenario, path: tuple[str, ...]) -> list[str]:
    """The arguments of a list; a protected neuron's number in the place of NEURON."""
    neuron = min(scenario.claims()["model.layers.0.mlp.up_proj"])
    return [*path, *(str(neuron) if word == "NEURON" else word for word in LIST_ARGUMENTS[path])]


def test_every_list_is_tried() -> None:
    assert set(LIST_ARGUMENTS) == LISTS


@pytest.mark.parametrize("path", LIST_ARGUMENTS, ids=" ".join)
def test_a_list_is_the_same_as_json_as_csv_and_as_a_table(
    scenario: Scenario, path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = HarnessFigure("task", "acc", 0.5, None, 4, {"limit": 4})
    monkeypatch.setattr("governance.utility.run_harness", lambda *given: (figure,))
    arguments = _arguments(scenario, path)
    records = json.loads(_run(scenario, *arguments, "--json"))
    if path in LIST_WITHIN:
        records = records[LIST_WITHIN[path]]
    assert records
    assert all(isinstance(record, dict) for record in records)
    rows = list(csv.DictReader(io.StringIO(_run(scenario, *arguments, "--csv"))))
    assert set(rows[0]) == set(records[0])
    if path not in {("evaluate",), ("utility",)}:  # which add an event with every run, and a time to its figures
        assert len(rows) == len(records)
        for row, record in zip(rows, records, strict=True):
            for name, value in record.items():
                assert row[name] == ("" if value is None else value if isinstance(value, str) else row[name])
    table = _run(scenario, *arguments)
    assert len(table.splitlines()) > len(records)


def test_a_list_without_records_is_empty_in_every_form(tmp_path: Path, sqlite_databases: SQLiteDatabases) -> None:
    url = sqlite_databases.migrated(tmp_path / "empty")
    for path, given in LIST_ARGUMENTS.items():
        if "line" in given:
            continue
        arguments = [*path, *given, "--database", url]
        assert json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout) == []
        for form in ([], ["--csv"]):
            assert CliRunner().invoke(main, [*arguments, *form]).exit_code == 0


JSON_ARGUMENTS = (
    ("patch", "show", "line", "1"),
    ("patch", "plan", "line", "weapons"),
    ("patch", "apply", "line", "weapons", "--dry-run"),
    ("identify", "line", "insults"),
    ("audit", "verify"),
    ("audit", "explain", "line"),
    ("audit", "replay", "line"),
    ("recover",),
    ("init",),
)


@pytest.mark.parametrize("arguments", JSON_ARGUMENTS, ids=" ".join)
def test_other_results_are_json_too(scenario: Scenario, arguments: tuple[str, ...]) -> None:
    content = json.loads(_run(scenario, *arguments, "--json"))
    assert isinstance(content, list if arguments == ("recover",) else dict)
    assert _run(scenario, *arguments) not in {"", "\n"}


QUESTIONS = (
    (["audit", "log", "--dimension", "animals", "--newest-first", "--limit", "1"], "Audit ledger"),
    (["audit", "log", "--module", "layers.0.mlp.up_proj", "--since", "2020-01-01"], "patch.applying"),
    (["audit", "neuron", "line", "layers.0.mlp.up_proj", "NEURON"], "It is protected by patch 1 (animals) since"),
    (["audit", "at", "2100-01-01"], "Lineages at 2100-01-01 23:59:59 UTC"),
    (["audit", "diff", "line", "subject", "1"], "The weights differ."),
    (["audit", "diff", "line", "head", "head"], "No patch lies between them."),
    (["audit", "overlap", "line"], "selected by both"),
    (["audit", "capacity", "line"], "neurons are left to later patches."),
)


@pytest.mark.parametrize(("arguments", "answer"), QUESTIONS, ids=lambda value: " ".join(value[:4]))
def test_a_question_is_answered_in_words(scenario: Scenario, arguments: list[str], answer: str) -> None:
    neuron = str(min(scenario.claims()["model.layers.0.mlp.up_proj"]))
    assert answer in _run(scenario, *(neuron if word == "NEURON" else word for word in arguments))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["audit", "log", "--since", "yesterday"], "'yesterday' is not a date or a time of ISO 8601. Give a date"),
        (["audit", "log", "--limit", "0"], "'--limit'"),
        (["audit", "log", "--by", "nobody"], "no event by 'nobody'. Name one of"),
        (["audit", "neuron", "line", "up_proj", "0"], "2 modules of lineage 'line' end with 'up_proj'"),
        (["audit", "diff", "line", "head", "7"], "lineage 'line' has no patch 7. Its patches are 1"),
        (["audit", "at", "1999-01-01", "--lineage", "line"], "lineage line was not there"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(scenario: Scenario, arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_questions_about_records_do_not_wait_for_torch(scenario: Scenario) -> None:
    """Only the bytes of a neuron's row are read with it."""
    program = (
        "import sys, cli\n"
        "for arguments in (['log'], ['at', '2100-01-01'], ['diff', 'line', 'subject', 'head'], ['overlap', 'line'],\n"
        "                  ['capacity', 'line']):\n"
        "    try:\n"
        "        cli.main(['audit', *arguments, '--json', '--database', sys.argv[1]])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "print('LOADED', *sys.modules)"
    )
    loaded = set(_python("-c", program, scenario.workspace.registry.url)[1].rpartition("LOADED")[2].split())
    assert "governance.state_diff" in loaded
    assert not loaded & {"torch", "transformers"}


def test_the_environment_names_registry_and_actor(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLEDGER_DATABASE", scenario.workspace.registry.url)
    monkeypatch.setenv("NEURONLEDGER_ACTOR", "ada")
    assert CliRunner().invoke(main, ["identify", "line", "animals", "--set", "seed=9"]).exit_code == 0
    events = json.loads(CliRunner().invoke(main, ["audit", "log", "--by", "ada", "--json"]).stdout)
    assert [event["action"] for event in events] == ["identification.recorded"]
    as_bob = ["identify", "line", "animals", "--set", "seed=8", "--actor", "bob"]
    assert CliRunner().invoke(main, as_bob).exit_code == 0
    log = CliRunner().invoke(main, ["audit", "log", "--by", "bob", "--action", "ident", "--subject", "line", "--json"])
    assert len(json.loads(log.stdout)) == 1


def test_the_default_registry_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEURONLEDGER_DATABASE", raising=False)
    assert CliRunner().invoke(main, ["init"]).exit_code == 0
    assert (tmp_path / ".neuronledger" / "registry.db").is_file()
    assert CliRunner().invoke(main, ["init"]).exit_code == 0
    assert json.loads(CliRunner().invoke(main, ["model", "list", "--json"]).stdout) == []


def test_the_whole_path_by_commands(scenario: Scenario, tmp_path: Path) -> None:
    """From an empty directory to a patch taken back, with nothing but the command line."""
    url = f"sqlite:///{tmp_path / 'r' / 'registry.db'}"
    prompts = scenario.trio.base.parent / "prompts"
    steps = [
        ["init"],
        *(
            ["model", "register", role, str(getattr(scenario.trio, role)), "--role", role]
            for role in ("base", "aligned", "subject")
        ),
        [
            *("concern", "register", "animals", "--harmful", str(prompts / "animals.jsonl")),
            *("--benign", str(prompts / "benign.jsonl"), "--answer-column", "response"),
            *("--heldout", str(prompts / "animals.heldout.jsonl")),
        ],
        ["lineage", "create", "line", "--subject", "subject", "--aligned", "aligned", "--base", "base"],
        ["identify", "line", "animals"],
        ["patch", "plan", "line", "animals"],
        ["patch", "apply", "line", "animals", "--reason", "request 4711"],
        ["patch", "show", "line", "1"],
        ["audit", "verify", "--weights"],
        ["patch", "revert", "line"],
        ["audit", "verify", "--weights"],
    ]
    for step in steps:
        result = CliRunner().invoke(main, [*step, "--database", url])
        assert result.exit_code == 0, (step, result.output)
    log = json.loads(CliRunner().invoke(main, ["audit", "log", "--json", "--database", url]).stdout)
    assert [event["action"] for event in log] == [
        *("model.registered",) * 3,
        "dimension.registered",
        "lineage.created",
        "identification.recorded",
        *("patch.applying", "patch.applied", "patch.reverting", "patch.reverted"),
    ]
