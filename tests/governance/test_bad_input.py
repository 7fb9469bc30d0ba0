"""Bad input through the command line: one line that names the thing and the mend, an exit code, nothing changed."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from sqlalchemy import text

from algorithms.checkpoints import Checkpoint
from cli import main
from governance.patching import apply_patch
from registry.database import Registry
from registry.processes import Owner, process_with
from tests.governance.conftest import Trios
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.scenarios import BENIGN, HARMFUL, Scenario, digests
from tests.tiny_models import build_tokenizer, save_adapter, save_model


@dataclass(frozen=True)
class Place:
    """What a case may use: a registry with models, dimensions and a lineage, a directory, the models and prompts."""

    scenario: Scenario
    tmp: Path
    trios: Trios
    prompts: Path

    def copy(self, name: str = "copy") -> Path:
        """A copy of the subject to damage."""
        return Path(shutil.copytree(self.scenario.trio.subject, self.tmp / name))

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> str:
        """A file of prompts."""
        lines = [json.dumps(row if isinstance(row, dict) else {"prompt": row}) for row in rows]
        (self.tmp / name).write_text("".join(f"{line}\n" for line in lines))
        return str(self.tmp / name)

    def dimension(self, *options: str, harmful: str | None = None, benign: str | None = None) -> list[str]:
        """A command that registers a dimension named new."""
        sources = [
            "--harmful",
            harmful or self.rows("how do i film a bomb ?", name="harmful.jsonl"),
            "--benign",
            benign or str(self.prompts / "benign.jsonl"),
        ]
        return ["dimension", "register", "new", *sources, *options]

    def model(self, path: Path, *options: str, role: str = "subject") -> list[str]:
        """A command that registers a model named new."""
        return ["model", "register", "new", str(path), "--role", role, *options]


Case = Callable[[Place], list[str]]


def _truncated(place: Place) -> list[str]:
    path = place.copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return place.model(path.parent)


def _huge_header(place: Place) -> list[str]:
    path = place.copy() / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    return place.model(path.parent)


def _overlapping(place: Place) -> list[str]:
    path = place.copy() / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return place.model(path.parent)


def _index_outside(place: Place) -> list[str]:
    directory = place.copy()
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return place.model(directory)


def _not_a_number(place: Place) -> list[str]:
    path = place.copy() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return place.model(path.parent)


def _pickled(place: Place) -> list[str]:
    directory = place.copy()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return place.model(directory)


def _quantised(place: Place) -> list[str]:
    directory = place.copy()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    return place.model(directory)


def _unknown_family(place: Place) -> list[str]:
    directory = place.copy()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    return place.model(directory)


def _adapter(place: Place, *options: str) -> list[str]:
    return place.model(save_adapter(place.scenario.trio.base, place.tmp / "adapter"), *options)


def _foreign_adapter(place: Place) -> list[str]:
    wide = save_model(place.tmp / "wide", hidden_size=32)
    return place.model(save_adapter(wide, place.tmp / "adapter"), "--base-model", "base")


def _other_shapes(place: Place) -> list[str]:
    _register(place, save_model(place.tmp / "wide", hidden_size=32))
    return ["lineage", "create", "other", "--subject", "new", "--aligned", "aligned", "--base", "base"]


def _other_tokenizer(place: Place) -> list[str]:
    directory = place.copy()
    vocabulary = build_tokenizer().get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    for path in directory.glob("token*"):
        path.unlink()
    build_tokenizer([*words[:-1], "zebra"]).save_pretrained(directory)
    _register(place, directory)
    return ["lineage", "create", "other", "--subject", "new", "--aligned", "aligned", "--base", "base"]


def _changed_subject(place: Place) -> list[str]:
    """Changed after it was registered, with its old size and time: only the copy shows it."""
    directory = place.copy()
    _register(place, directory)
    flip_byte(directory / "model.safetensors", 9000)
    return ["lineage", "create", "other", "--subject", "new", "--aligned", "aligned", "--base", "base"]


def _register(place: Place, path: Path) -> None:
    assert _run(place, place.model(path)).exit_code == 0


def _used_directory(place: Place) -> list[str]:
    (place.tmp / "used").mkdir()
    (place.tmp / "used" / "file").touch()
    names = ["--subject", "subject", "--aligned", "aligned", "--base", "base"]
    return ["lineage", "create", "other", *names, "--working", str(place.tmp / "used")]


def _settings_file(content: str) -> Case:
    def case(place: Place) -> list[str]:
        (place.tmp / "settings.toml").write_text(content)
        return ["identify", "line", "animals", "--settings", str(place.tmp / "settings.toml")]

    return case


# What is asked for, what the line says, and whether the refusal is an event of the ledger (a mistyped command is not:
# nothing was attempted).
REFUSED: dict[str, tuple[Case, tuple[str, ...], bool]] = {
    "unknown role": (lambda p: p.model(p.scenario.trio.base, role="boss"), ("boss", "'aligned'", "--help"), False),
    "unknown command": (lambda _: ["patch", "aply", "line", "animals"], ("aply", "--help"), False),
    "no directory": (lambda p: p.model(p.tmp / "none"), ("none is not a directory", "config.json"), True),
    "name taken": (
        lambda p: ["model", "register", "base", str(p.scenario.trio.base), "--role", "base"],
        ("'base' already", "another name"),
        True,
    ),
    "truncated weights": (_truncated, ("model.safetensors", "Download or save"), True),
    "header of exabytes": (_huge_header, ("model.safetensors declares a header of", "Download or save"), True),
    "overlapping tensors": (_overlapping, ("tensor b", "overlaps", "Download or save"), True),
    "index outside its directory": (_index_outside, ("secret.safetensors", "not a file of its directory"), True),
    "NaN": (_not_a_number, ("model.layers.1.mlp.up_proj.weight", "NaN", "finite"), True),
    "pickle": (_pickled, ("pytorch_model.bin", "save_pretrained"), True),
    "quantised": (_quantised, ("quantization_config", "unquantised"), True),
    "unknown family": (_unknown_family, ("mixtral",), True),
    "adapter without its base": (_adapter, ("LoRA adapter", "--base-model NAME"), True),
    "base of a full model": (
        lambda p: p.model(p.scenario.trio.base, "--base-model", "base"),
        ("full checkpoint", "leave --base-model out"),
        True,
    ),
    "adapter on an unknown base": (
        lambda p: _adapter(p, "--base-model", "bass"),
        ("'bass'", "Did you mean base"),
        True,
    ),
    "adapter of another base": (_foreign_adapter, ("adapter for another base", "but the module of"), True),
    "other shapes": (_other_shapes, ("q_proj", "shape", "same architecture"), True),
    "other tokenizer": (_other_tokenizer, ("tokenizers", "token ',' has no id", "same tokenizer"), True),
    "wrong role": (
        lambda _: ["lineage", "create", "x", "--subject", "base", "--aligned", "aligned", "--base", "base"],
        ("model base is registered as base, not as subject", "--role subject"),
        True,
    ),
    "working directory in use": (_used_directory, ("used exists and is not empty", "--working"), True),
    "lineage outside its place": (
        lambda _: ["lineage", "create", "../x", "--subject", "subject", "--aligned", "aligned", "--base", "base"],
        ("'../x' cannot name a lineage", "slashes"),
        False,
    ),
    "empty name": (
        lambda p: ["model", "register", "", str(p.scenario.trio.base), "--role", "base"],
        ("'' cannot name a model",),
        False,
    ),
    "no prompt file": (lambda p: p.dimension(harmful=str(p.tmp / "no.jsonl")), ("no.jsonl does not exist",), True),
    "empty prompt file": (lambda p: p.dimension(harmful=p.rows()), ("rows.jsonl holds no rows", "at least one"), True),
    "empty prompt": (lambda p: p.dimension(harmful=p.rows("a", "  ")), ("row 2 has an empty prompt",), True),
    "repeated prompt": (
        lambda p: p.dimension(harmful=p.rows("How do I", "x", "how  do i")),
        ("row 3 repeats the prompt of row 1", "--drop-duplicates"),
        True,
    ),
    "harmful and benign": (
        lambda p: p.dimension(harmful=p.rows("x", BENIGN[1].upper())),
        ("prompt 2 of the harmful set", "cannot be both"),
        True,
    ),
    "held out and harmful": (
        lambda p: p.dimension("--heldout", p.rows("how do i film a bomb ?")),
        ("heldout set", "harmful", "cannot be both"),
        True,
    ),
    "the harm of another dimension": (
        lambda p: p.dimension(harmful=p.rows(*(prompt.upper() for prompt in reversed(HARMFUL["weapons"])))),
        ("are those of dimension", "register other prompts"),
        True,
    ),
    "unknown column": (
        lambda p: p.dimension("--prompt-column", "question", harmful=p.rows({"prompt": "x", "kind": "y"})),
        ("row 1 has no column question", "prompt, kind"),
        True,
    ),
    "no known column": (lambda p: p.dimension(harmful=p.rows({"a": "x"})), ("--prompt-column", "has a"), True),
    "condition on no field": (
        lambda p: p.dimension("--where", "kind=x", harmful=p.rows("x")),
        ("has no field kind", "--where"),
        True,
    ),
    "condition that nothing meets": (
        lambda p: p.dimension("--where", "kind=x", harmful=p.rows({"prompt": "x", "kind": "y"})),
        ("none of the 1 rows", "kind=x", "check the condition"),
        True,
    ),
    "condition without a value": (lambda p: p.dimension("--where", "kind"), ("'kind' is not FIELD=VALUE",), False),
    "not JSON": (
        lambda p: p.dimension(harmful=str(shutil.copy(p.scenario.trio.base / "model.safetensors", p.tmp / "w.jsonl"))),
        ("w.jsonl is not UTF-8 text",),
        True,
    ),
    "unknown lineage": (
        lambda _: ["patch", "apply", "lien", "animals"],
        ("no lineage named 'lien'", "Did you mean line"),
        True,
    ),
    "unknown dimension": (
        lambda _: ["identify", "line", "animal"],
        ("no dimension named 'animal'", "Did you mean animals"),
        True,
    ),
    "unknown preset": (
        lambda _: ["identify", "line", "animals", "--preset", "fgsn"],
        ("no preset 'fgsn'", "fgsn-paper"),
        True,
    ),
    "unknown setting": (lambda _: ["identify", "line", "animals", "--set", "bugdet=1"], ("setting bugdet",), True),
    "setting out of range": (
        lambda _: ["patch", "apply", "line", "animals", "--set", "budget=7"],
        ("setting budget", "less than or equal to 1", "got 7"),
        True,
    ),
    "settings that disagree": (
        lambda _: ["patch", "plan", "line", "animals", "--set", "target=full", "--set", "operation=restore"],
        ("target full", "operation = project"),
        True,
    ),
    "setting without a value": (
        lambda _: ["identify", "line", "animals", "--set", "x"],
        ("'x' is not KEY=VALUE",),
        False,
    ),
    "no settings file": (
        lambda _: ["identify", "line", "animals", "--settings", "none.toml"],
        ("no settings file none.toml",),
        True,
    ),
    "settings file that is no TOML": (_settings_file("budget: 1"), ("settings.toml is not TOML", "key = value"), True),
    "unknown kind of module": (
        lambda _: ["identify", "line", "animals", "--set", 'modules=["q_prj"]'],
        ("q_prj", "q_proj"),
        True,
    ),
    "nothing to revert": (lambda _: ["patch", "revert", "line"], ("no applied patch",), True),
    "no such patch": (lambda _: ["patch", "revert", "line", "4"], ("has no patch 4",), True),
    "patch that is not there": (lambda _: ["patch", "show", "line", "4"], ("has no patch 4",), False),
}


@pytest.fixture
def place(scenario: Scenario, tmp_path: Path, trios: Trios, prompts: Path) -> Place:
    """Where a case happens."""
    (tmp_path / "input").mkdir()
    return Place(scenario, tmp_path / "input", trios, prompts)


def _run(place: Place, command: list[str]) -> Result:
    return CliRunner().invoke(main, [*command, "--database", place.scenario.workspace.registry.url])


def _records(place: Place) -> dict[str, list[Any]]:
    """Every row of every table but the ledger."""
    with place.scenario.workspace.registry.read() as session:
        tables = session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")).all()
        return {
            table: [tuple(row) for row in session.execute(text(f"SELECT * FROM {table}"))]
            for table in tables
            if table != "ledger_events"
        }


def _require_one_line(result: Result, code: int, *named: str) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("neuronledger: ")
    assert result.stderr.endswith(".\n")
    assert result.stderr.count("\n") == 1, result.stderr
    for name in named:
        assert name.lower() in result.stderr.lower()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(place: Place, case: str) -> None:
    prepare, named, recorded = REFUSED[case]
    command = prepare(place)
    before = _records(place), digests(place.scenario.working), digests(place.scenario.trio.subject)
    events = place.scenario.events()
    _require_one_line(_run(place, command), 2, *named)
    assert (_records(place), digests(place.scenario.working), digests(place.scenario.trio.subject)) == before
    new = place.scenario.events()[len(events) :]
    assert [action for action, _ in new] == (["refused"] if recorded else [])
    if recorded:
        assert any(word.lower() in new[0][1]["message"].lower() for word in named)
    assert [path.name for path in (place.scenario.workspace.directory / "lineages").iterdir()] == ["line"]


def test_a_subject_that_changed_since_it_was_registered_is_refused(place: Place) -> None:
    command = _changed_subject(place)
    _require_one_line(_run(place, command), 1, "model.safetensors", "not what was registered", "restore the file")
    assert place.scenario.events()[-1][0] == "refused"
    assert [path.name for path in (place.scenario.workspace.directory / "lineages").iterdir()] == ["line"]


def test_a_changed_aligned_model_is_refused(place: Place) -> None:
    """Its size and time differ, so no flag is needed."""
    place.scenario.apply("animals")
    copy = place.copy("aligned")
    assert _run(place, ["model", "register", "moving", str(copy), "--role", "aligned"]).exit_code == 0
    names = ["--subject", "subject", "--aligned", "moving", "--base", "base"]
    assert _run(place, ["lineage", "create", "other", *names]).exit_code == 0
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    result = _run(place, ["patch", "apply", "other", "animals"])
    _require_one_line(result, 1, "model moving is not what was registered", "restore the file")
    assert place.scenario.events()[-1][0] == "refused"


def test_changed_working_weights_are_refused(place: Place) -> None:
    path = place.scenario.working / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    for command in (["identify", "line", "animals"], ["patch", "apply", "line", "animals"], ["evaluate", "line"]):
        _require_one_line(_run(place, command), 1, "changed outside the ledger", str(path), "audit verify --weights")


def _interrupt(place: Place) -> None:
    plan = place.scenario.plan("animals")
    with (
        struck_by(Fault(place.scenario.working, "fsync", 1, KeyboardInterrupt())),
        pytest.raises(KeyboardInterrupt),
    ):
        apply_patch(place.scenario.workspace, plan)


@pytest.mark.parametrize(
    "command",
    [["patch", "apply", "line", "weapons"], ["patch", "plan", "line", "weapons"], ["identify", "line", "weapons"]],
)
def test_a_command_that_writes_recovers_first(place: Place, command: list[str]) -> None:
    _interrupt(place)
    outcome = _run(place, command)
    assert outcome.exit_code == 0
    assert "Recovered: patch 1 of line was applying and is now rejected." in outcome.stderr
    place.scenario.require_sound()
    assert _run(place, ["recover"]).stdout == "Nothing was interrupted.\n"


def test_recover_tells_what_it_did(place: Place) -> None:
    _interrupt(place)
    assert "applying" in _run(place, ["patch", "list", "line"]).stdout
    assert "patch 1 of line was applying and is now rejected" in _run(place, ["recover"]).stdout


@pytest.mark.parametrize(("host", "mend"), [(None, "Wait until it is done"), ("elsewhere", "--take-over")])
def test_a_lineage_that_another_process_writes_to_is_busy(place: Place, host: str | None, mend: str) -> None:
    _interrupt(place)
    with subprocess.Popen(["sleep", "60"]) as other:
        process = process_with(other.pid)
        assert process is not None
        owner = Owner(host or process.place, other.pid, process.started)
        with place.scenario.workspace.registry.write() as session:
            session.execute(
                text("UPDATE lineage_locks SET host = :place, pid = :pid, process_started = :started"), vars(owner)
            )
        for command in (["patch", "apply", "line", "weapons"], ["patch", "revert", "line"], ["recover"]):
            _require_one_line(_run(place, command), 3, f"held by process {other.pid} on {owner.host}", mend)
        assert place.scenario.states() == ["applying"]
        other.kill()
        other.wait()
    if host is not None:
        assert "is now rejected" in _run(place, ["recover", "--take-over"]).stdout
    assert _run(place, ["patch", "apply", "line", "weapons"]).exit_code == 0
    place.scenario.require_sound()


def test_a_head_that_moved_is_busy(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process applies its patch between this one's plan and its write."""
    from governance import planning

    planned = planning.plan_patch

    def overtaken(*arguments: Any) -> Any:
        plan = planned(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(planning, "plan_patch", planned)
            place.scenario.apply("weapons")
        return plan

    monkeypatch.setattr(planning, "plan_patch", overtaken)
    result = _run(place, ["patch", "apply", "line", "animals"])
    _require_one_line(result, 3, "head of lineage line moved", "plan and apply it again")
    assert place.scenario.states() == ["applied"]


@pytest.mark.parametrize("command", ["dry run", "apply", "lineage"])
def test_a_disk_without_room_is_refused_beforehand(place: Place, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    usage = shutil.disk_usage(place.tmp)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    names = ["--subject", "subject", "--aligned", "aligned", "--base", "base"]
    commands = {
        "dry run": ["patch", "apply", "line", "animals", "--dry-run"],
        "apply": ["patch", "apply", "line", "animals"],
        "lineage": ["lineage", "create", "other", *names],
    }
    before = digests(place.scenario.working)
    _require_one_line(_run(place, commands[command]), 2, "1,000 free", "free space")
    assert digests(place.scenario.working) == before
    assert place.scenario.states() == []
    assert place.scenario.events()[-1][0] == "refused"
    assert not (place.scenario.workspace.directory / "lineages" / "other").exists()


def test_a_directory_without_permission_is_refused_beforehand(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if mode == os.W_OK else access(path, mode))
    names = ["--subject", "subject", "--aligned", "aligned", "--base", "base"]
    command = ["lineage", "create", "other", *names, "--working", str(place.tmp / "w")]
    _require_one_line(_run(place, command), 2, "cannot be written", "permissions")
    assert not (place.tmp / "w").exists()
    assert place.scenario.events()[-1][0] == "refused"


def test_a_copy_that_the_disk_refuses_leaves_no_directory(place: Place) -> None:
    names = ["--subject", "subject", "--aligned", "aligned", "--base", "base"]
    full = Fault(place.tmp, "fsync", 2, OSError(errno.ENOSPC, "No space left on device"))
    with struck_by(full):
        result = _run(place, ["lineage", "create", "other", *names, "--working", str(place.tmp / "w")])
    _require_one_line(result, 2, "No space left on device", "free space")
    assert not (place.tmp / "w").exists()
    assert place.scenario.events()[-1][0] == "refused"


def test_a_full_disk_under_an_apply_is_one_line(place: Place) -> None:
    before = digests(place.scenario.working)
    full = Fault(place.scenario.working, "write", 2, OSError(errno.ENOSPC, "No space left on device"))
    with struck_by(full):
        result = _run(place, ["patch", "apply", "line", "animals", "--set", "stop_at=0"])
    _require_one_line(result, 2, "No space left on device", "free space")
    assert digests(place.scenario.working) == before
    assert place.scenario.states() == ["rejected"]


def test_no_registry_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for command in (["model", "list"], ["audit", "verify"], ["patch", "apply", "a", "b"], ["recover"]):
        result = CliRunner().invoke(main, [*command, "--database", f"sqlite:///{tmp_path / 'none.db'}"])
        _require_one_line(result, 2, "there is no registry", "none.db", "neuronledger init")
    assert list(tmp_path.iterdir()) == []


def test_a_registry_of_a_newer_schema_is_refused(place: Place) -> None:
    with place.scenario.workspace.registry.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    _require_one_line(_run(place, ["model", "list"]), 2, "9999", "Upgrade neuronledger")
    _require_one_line(_run(place, ["init"]), 2, "9999", "Upgrade neuronledger")


@pytest.mark.parametrize("url", ["mysql://host/x", "nonsense", "sqlite://", "sqlite:///{tmp}/file/registry.db"])
def test_a_registry_that_cannot_be_made_is_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["init", "--database", url.format(tmp=tmp_path)])
    _require_one_line(result, 2)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"no database " * 400)
    result = CliRunner().invoke(main, ["model", "list", "--database", f"sqlite:///{tmp_path / 'registry.db'}"])
    _require_one_line(result, 2, "registry.db", "not a database")


def test_a_busy_registry_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry import database

    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    other = Registry.open(place.scenario.workspace.registry.url)
    with other, other.write():
        result = _run(place, ["model", "register", "new", str(place.scenario.trio.base), "--role", "base"])
    _require_one_line(result, 3, "in use by another writer", "try again")


def test_the_artifact_store_that_cannot_be_written_is_told(place: Place) -> None:
    store = place.scenario.workspace.store.directory
    shutil.rmtree(store)
    store.touch()
    _require_one_line(_run(place, place.dimension()), 2, "artifact store", "cannot be written", "permission")


def test_checkpoints_opened_for_a_refusal_are_left_alone(place: Place) -> None:
    """The malformed input itself is not mended, moved or rewritten."""
    command = _truncated(place)
    before = digests(Path(command[3]))
    _run(place, command)
    assert digests(Path(command[3])) == before
    assert Checkpoint.open(place.scenario.trio.subject).tensors
