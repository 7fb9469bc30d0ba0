"""`audit verify`: whatever is changed behind the registry's back is found and named, and the exit code says so."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import delete, insert, text

from algorithms.checkpoints import Checkpoint
from algorithms.safetensors_files import read_header
from cli import main
from governance import auditing
from governance.auditing import verify
from governance.lineages import create_lineage
from governance.patching import apply_patch, revert_patch
from governance.recovery import recover
from governance.weight_state import measure_tensors, tree_state
from governance.workspace import Workspace
from registry import ledger, locks, queries
from registry.database import Registry
from registry.head_lines import check_ledger
from registry.processes import this_process
from registry.schema import LedgerEvent
from tests.governance.conftest import Trios
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.scenarios import Scenario, Trio, build


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, registered: Callable[[Trio], Path], trios: Trios
) -> tuple[Path, Path]:
    """Where a registry with two applied patches and a reverted one has to lie, and a copy to put there."""
    place = tmp_path_factory.mktemp("patched") / "registry"
    shutil.copytree(registered(trios()), place)
    with Registry.open(f"sqlite:///{place / 'registry.db'}") as registry:
        workspace = Workspace(registry=registry, actor="tester")
        create_lineage(workspace, "line", subject="subject", aligned="aligned", base="base")
        scenario = Scenario(workspace, trios())
        scenario.apply("weapons")
        scenario.apply("animals")
        scenario.apply("insults", budget=0.2)
        scenario.revert(2)
    copy = place.with_name("copy")
    shutil.copytree(place, copy)
    return place, copy


@pytest.fixture
def patched(pristine: tuple[Path, Path], trios: Trios) -> Iterator[Scenario]:
    """Two patches applied and one taken back again, for a test to tamper with."""
    place, copy = pristine
    shutil.rmtree(place)
    shutil.copytree(copy, place)
    with Registry.open(f"sqlite:///{place / 'registry.db'}") as registry:
        yield Scenario(Workspace(registry=registry, actor="tester"), trios())


def _verify(scenario: Scenario, *options: str) -> Result:
    command = ["audit", "verify", *options, "--database", scenario.workspace.registry.url]
    return CliRunner().invoke(main, command)


def _require_found(scenario: Scenario, *named: str, options: tuple[str, ...] = ()) -> None:
    """The check fails with exit code 1, says so, and names the thing; the same in JSON."""
    result = _verify(scenario, *options)
    assert result.exit_code == 1, result.output
    assert "Everything checked agrees" not in result.output
    for name in named:
        assert name in result.stderr
    told = _verify(scenario, *options, "--json")
    assert told.exit_code == 1
    content = json.loads(told.stdout)
    assert content["verified"] is False
    assert all(any(name in json.dumps(finding) for finding in content["findings"]) for name in named)


def _require_sound(scenario: Scenario, *options: str) -> None:
    result = _verify(scenario, *options)
    assert (result.exit_code, "Everything checked agrees." in result.stdout, result.stderr) == (0, True, "")
    assert json.loads(_verify(scenario, *options, "--json").stdout)["verified"] is True


def _change(scenario: Scenario, *statements: str) -> None:
    """Run SQL as somebody would who owns the database: triggers are dropped first."""
    with scenario.workspace.registry.write() as session:
        triggers = session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all()
        for trigger in triggers:
            session.execute(text(f"DROP TRIGGER {trigger}"))
        for statement in statements:
            assert session.execute(text(statement)).rowcount > 0


def test_what_nobody_touched_agrees(patched: Scenario) -> None:
    _require_sound(patched)
    _require_sound(patched, "--weights")
    _require_sound(patched, "--weights", "--lineage", "line")
    assert "Not checked: file contents" in _verify(patched).stdout
    everything = _verify(patched, "--weights").stdout
    assert everything.count("Not checked") == 1
    assert "Not checked: files that hold no weights, such as config.json and the tokenizer" in everything


def _byte(scenario: Scenario) -> tuple[Path, int]:
    stored = Checkpoint.open(scenario.working).stored("model.layers.1.mlp.up_proj.weight")
    return scenario.working / stored.file, stored.begin + 3


def test_a_changed_byte_of_the_working_weights_is_found(patched: Scenario) -> None:
    path, offset = _byte(patched)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    _require_found(patched, str(path))
    _require_found(patched, str(path), "model.layers.1.mlp.up_proj.weight", options=("--weights",))


def test_a_changed_byte_behind_an_old_time_stamp_is_found_with_weights(patched: Scenario) -> None:
    path, offset = _byte(patched)
    flip_byte(path, offset)
    _require_sound(patched)
    _require_found(patched, str(path), "model.layers.1.mlp.up_proj.weight", options=("--weights",))


def test_changed_weights_are_found_though_their_digests_were_changed_with_them(patched: Scenario) -> None:
    """The head's digest stands in the ledger, so the tensors' records alone cannot be forged."""
    path, offset = _byte(patched)
    flip_byte(path, offset)
    header = read_header(path)
    tensors = measure_tensors(path.parent, header.tensors.values(), {})
    tree = tree_state(header, tensors)
    _change(
        patched,
        f"UPDATE lineage_files SET digest = '{tree.digest}'",
        *(f"UPDATE lineage_tensors SET digest = '{t.digest}' WHERE name = '{t.name}'" for t in tensors),
    )
    _require_found(patched, "lineage line", "digest of its head", options=("--weights",))


@pytest.mark.parametrize("content", [b"", b"no safetensors"], ids=["empty", "nonsense"])
def test_a_ruined_weight_file_is_a_finding_and_no_crash(patched: Scenario, content: bytes) -> None:
    (patched.working / "model.safetensors").write_bytes(content)
    _require_found(patched, "model.safetensors", options=("--weights",))


def test_a_missing_weight_file_is_found(patched: Scenario) -> None:
    (patched.working / "model.safetensors").unlink()
    _require_found(patched, "is missing")
    _require_found(patched, "is missing", options=("--weights",))


def test_a_ruined_adapter_is_a_finding_and_no_crash(lora_scenario: Scenario) -> None:
    lora_scenario.apply("animals")
    (lora_scenario.working / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    _require_found(lora_scenario, "adapter_config.json", options=("--weights",))


def test_a_changed_model_is_found(sqlite_workspace: Workspace, tmp_path: Path, trios: Trios, prompts: Path) -> None:
    shutil.copytree(trios().aligned, tmp_path / "aligned")
    scenario = build(sqlite_workspace, Trio(trios().subject, tmp_path / "aligned", trios().base), prompts)
    flip_byte(tmp_path / "aligned" / "model.safetensors", 5000)
    _require_sound(scenario)
    _require_found(scenario, "aligned", str(tmp_path / "aligned" / "model.safetensors"), options=("--weights",))


@pytest.mark.parametrize("sequence", [1, 2], ids=["applied", "reverted"])
def test_a_changed_byte_of_an_artifact_is_found(patched: Scenario, sequence: int) -> None:
    path = patched.artifact(sequence)
    flip_byte(path, path.stat().st_size - 1)
    _require_found(patched, f"patch {sequence} of line", "was changed")


def test_a_damaged_artifact_is_a_finding_for_everybody_who_rests_on_it(patched: Scenario) -> None:
    """Two lineages of one subject, patched alike, have one artifact between them."""
    create_lineage(patched.workspace, "twin", subject="subject", aligned="aligned", base="base")
    Scenario(patched.workspace, patched.trio, "twin").apply("weapons")
    assert Scenario(patched.workspace, patched.trio, "twin").artifact(1) == patched.artifact(1)
    flip_byte(patched.artifact(1), 40)
    findings = verify(patched.workspace).findings
    assert {finding.subject for finding in findings} == {"patch 1 of line", "patch 1 of twin"}
    _require_found(patched, "patch 1 of line", "patch 1 of twin")


def test_a_missing_prompt_artifact_is_found(patched: Scenario) -> None:
    with patched.workspace.registry.read() as session:
        digest = session.scalar(text("SELECT digest FROM prompt_sets WHERE purpose = 'benign'"))
    patched.workspace.store.path(digest).unlink()
    _require_found(patched, "benign prompts", digest)


def test_a_missing_identification_artifact_is_found(patched: Scenario) -> None:
    with patched.workspace.registry.read() as session:
        digest = session.scalar(text("SELECT artifact_digest FROM identifications WHERE id = 2"))
    patched.workspace.store.path(digest).unlink()
    _require_found(patched, "identification 2", digest)


EDITED_EVENTS = {
    "payload": "UPDATE ledger_events SET payload = replace(payload, 'subject', 'other') WHERE sequence = 7",
    "actor": "UPDATE ledger_events SET actor = 'nobody' WHERE sequence = 7",
    "action": "UPDATE ledger_events SET action = 'identification.refused' WHERE sequence = 7",
    "time": "UPDATE ledger_events SET created_at = '2020-01-01T00:00:00.000000Z' WHERE sequence = 7",
    "no JSON": "UPDATE ledger_events SET payload = 'x' WHERE sequence = 7",
    "no object": "UPDATE ledger_events SET payload = '[1]' WHERE sequence = 7",
}


@pytest.mark.parametrize("edit", EDITED_EVENTS)
def test_an_edited_event_is_found(patched: Scenario, edit: str) -> None:
    _change(patched, EDITED_EVENTS[edit])
    _require_found(patched, "event 7")
    assert CliRunner().invoke(main, ["audit", "log", "--database", patched.workspace.registry.url]).exit_code == 0


def test_a_removed_event_is_found(patched: Scenario) -> None:
    _change(patched, "DELETE FROM ledger_events WHERE sequence = 8")
    _require_found(patched, "event 8 is missing")


def test_a_ledger_whose_end_was_cut_off_is_found(patched: Scenario) -> None:
    _change(patched, "DELETE FROM ledger_events WHERE sequence > 9")
    _require_found(patched, "ends after event 9", "cut off")


def test_missing_and_damaged_ledger_heads_are_found(patched: Scenario) -> None:
    path = patched.workspace.registry.heads.path
    lines = path.read_text()
    path.write_text(lines + "no head\n")
    _require_found(patched, "is not a head")
    path.unlink()
    _require_found(patched, "exported heads are missing")


@pytest.mark.parametrize("place", [0, 3, -1], ids=["first", "inner", "last"])
def test_a_line_removed_from_the_exported_heads_is_found(patched: Scenario, place: int) -> None:
    path = patched.workspace.registry.heads.path
    lines = path.read_text().splitlines(keepends=True)
    removed = json.loads(lines.pop(place))
    path.write_text("".join(lines))
    named = "lines were removed" if place == -1 else f"comes after the head of event {removed['count']}"
    _require_found(patched, named)


def test_exported_heads_in_another_order_are_found(patched: Scenario) -> None:
    path = patched.workspace.registry.heads.path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    _require_found(patched, "line 4 of the ledger head file", "out of order")


def test_what_a_process_did_not_live_to_append_is_found_and_completed_by_recover(patched: Scenario) -> None:
    path = patched.workspace.registry.heads.path
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"{")])
    _require_found(patched, "`neuronledger recover` completes it")
    done = CliRunner().invoke(main, ["recover", "--database", patched.workspace.registry.url])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "Completed the exported heads" in done.stderr
    assert path.read_bytes() == whole
    _require_sound(patched)


EDITED_PATCHES = {
    "state": ("UPDATE patches SET state = 'reverted' WHERE sequence = 1", "patch 1 of line"),
    "revived": ("UPDATE patches SET state = 'applied' WHERE sequence = 2", "patch 2 of line"),
    "digest_after": (f"UPDATE patches SET digest_after = '{'0' * 64}' WHERE sequence = 1", "digest_after"),
    "digest_before": (f"UPDATE patches SET digest_before = '{'0' * 64}' WHERE sequence = 2", "digest_before"),
    "neurons": ("UPDATE patches SET neurons_modified = 1 WHERE sequence = 1", "neurons_modified"),
    "parameters": ("UPDATE patches SET parameters_modified = 1 WHERE sequence = 3", "parameters_modified"),
    "dimension": ("UPDATE patches SET dimension_id = 3 WHERE sequence = 1", "dimension"),
    "identification": ("UPDATE patches SET identification_id = 2 WHERE sequence = 1", "identification"),
    "settings": ("UPDATE patches SET settings = replace(settings, '0.1', '0.2') WHERE sequence = 1", "settings_digest"),
    "actor": ("UPDATE patches SET actor = 'nobody' WHERE sequence = 1", "actor"),
    "reason": ("UPDATE patches SET reason = 'none' WHERE sequence = 2", "reason"),
    "head digest": (f"UPDATE lineages SET state_digest = '{'0' * 64}'", "lineage line"),
    "model digest": (f"UPDATE models SET state_digest = '{'0' * 64}' WHERE name = 'base'", "model base"),
    "model file": (f"UPDATE model_files SET digest = '{'0' * 64}' WHERE model_id = 2", "model aligned"),
}


@pytest.mark.parametrize("edit", EDITED_PATCHES)
def test_an_edited_record_is_found(patched: Scenario, edit: str) -> None:
    statement, named = EDITED_PATCHES[edit]
    _change(patched, statement)
    _require_found(patched, named)


def test_a_removed_patch_record_is_found(patched: Scenario) -> None:
    with patched.workspace.registry.write() as session:
        session.execute(text("PRAGMA defer_foreign_keys = ON"))
        session.execute(text("DELETE FROM patch_modules WHERE patch_id = 2"))
        session.execute(text("UPDATE patches SET parent_patch_id = NULL"))
        session.execute(text("UPDATE identifications SET head_patch_id = NULL"))
        session.execute(text("UPDATE identified_neurons SET protected_by = NULL"))
        session.execute(text("DELETE FROM patches WHERE sequence = 2"))
    _require_found(patched, "patch 2 of line", "it has no record")


_ADD = "INSERT INTO protected_neurons (lineage_id, module_id, neuron, patch_id) VALUES (1, {module}, {row}, {patch})"
_ONE = "(SELECT module_id, neuron FROM protected_neurons LIMIT 1)"
CLAIMS: dict[str, tuple[str, str]] = {
    "removed": (f"DELETE FROM protected_neurons WHERE (module_id, neuron) IN {_ONE}", "written, but not claimed"),
    "added": (_ADD.format(module="{module}", row="{row}", patch=1), "claimed, but not in its artifact"),
    "of a reverted patch": (_ADD.format(module="{module}", row="{row}", patch=2), "not applied"),
    "of another model": (_ADD.format(module=1, row=0, patch=1), "claimed, but not in its artifact"),
    "moved to another patch": ("UPDATE protected_neurons SET patch_id = 3 WHERE patch_id = 1", "patch 1"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_claim_that_was_changed_behind_the_registry_is_found(patched: Scenario, what: str) -> None:
    name = "model.layers.0.self_attn.q_proj"
    with patched.workspace.registry.read() as session:
        lineage = queries.get_lineage(session, "line")
        module = queries.module_ids(session, lineage.subject_id)[name]
    free = next(row for row in range(16) if row not in patched.claims().get(name, {}))
    statement, named = CLAIMS[what]
    _change(patched, statement.format(module=module, row=free))
    _require_found(patched, named)


def _interrupt(scenario: Scenario, act: str) -> int:
    """Patch 1 being taken back, or patch 4 being applied, by work that ended halfway; gives the number."""
    plan = scenario.plan("animals", score="random", seed=5) if act == "applying" else None
    with struck_by(Fault(scenario.working, "fsync", 1, KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        apply_patch(scenario.workspace, plan) if plan else revert_patch(scenario.workspace, "line", 1)
    return 4 if plan else 1


@pytest.mark.parametrize("options", [(), ("--weights",)])
@pytest.mark.parametrize("act", ["applying", "reverting"])
def test_an_interrupted_patch_is_one_finding_that_says_so(
    patched: Scenario, act: str, options: tuple[str, ...]
) -> None:
    """Weights that were being written are not those of the head, and claims of a revert are still held."""
    told = f"patch {_interrupt(patched, act)} is {act}: it was interrupted; run neuronledger recover"
    _require_found(patched, told, options=options)
    (finding,) = verify(patched.workspace, weights=bool(options)).findings
    assert finding.subject == "lineage line"
    recover(patched.workspace)
    _require_sound(patched, "--weights")


def test_a_patch_that_is_being_written_is_no_finding(patched: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, as of every command that has to wait; what else is wrong is found all the same."""
    _interrupt(patched, "applying")
    monkeypatch.setattr(locks, "liveness", lambda _: "alive")
    waiting = _verify(patched, "--weights")
    assert (waiting.exit_code, waiting.stdout) == (3, "")
    assert "lineage line is held by process" in waiting.stderr
    flip_byte(patched.artifact(1), 5)
    (finding,) = verify(patched.workspace).findings
    assert finding.check == "artifact"
    assert "lineage line is held by process" in _verify(patched).output


def test_weights_that_somebody_patched_meanwhile_are_not_blamed(
    patched: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are read first, and the files after somebody else has written them."""
    plan = patched.plan("animals")
    check = auditing._check_working

    def late(*arguments: Any, **options: Any) -> Iterator[auditing.Finding]:
        monkeypatch.setattr(auditing, "_check_working", check)
        apply_patch(patched.workspace, plan)
        return check(*arguments, **options)

    monkeypatch.setattr(auditing, "_check_working", late)
    result = _verify(patched)
    assert (result.exit_code, "changed while it was checked" in result.stderr) == (3, True)
    _require_sound(patched, "--weights")


@pytest.mark.parametrize("state", ["applying", "reverting"])
def test_a_forged_state_is_found_with_and_without_a_forged_lock(patched: Scenario, state: str) -> None:
    _change(patched, f"UPDATE patches SET state = '{state}' WHERE sequence = 1")
    _require_found(patched, f"patch 1 is {state}", "its record says")
    for host in ("elsewhere", this_process().host):
        _change(
            patched,
            "INSERT INTO lineage_locks (lineage_id, purpose, host, pid, process_started, token, actor, acquired_at) "
            f"SELECT id, 'patch apply', '{host}', 1, 1, 'x', 'x', created_at FROM lineages WHERE name = 'line'",
        )
        _require_found(patched, "its record says")
        _change(patched, "DELETE FROM lineage_locks")


def test_an_unknown_lineage_is_an_error_not_a_finding(patched: Scenario) -> None:
    result = _verify(patched, "--lineage", "lime")
    assert result.exit_code == 2
    assert "line" in result.stderr
    assert result.stdout == ""


def test_a_verification_fails_exactly_where_there_is_a_finding(patched: Scenario) -> None:
    told: list[Any] = []
    for statement in ("SELECT 1", "UPDATE patches SET actor = 'x' WHERE sequence = 3"):
        if statement.startswith("UPDATE"):
            _change(patched, statement)
        result = _verify(patched, "--json")
        content = json.loads(result.stdout)
        told.append((result.exit_code, content["verified"], bool(content["findings"])))
    assert told == [(0, True, False), (1, False, True)]


def _positions(path: Path, begins: Iterable[int]) -> list[int]:
    """Where to change a safetensors file: its length field, its header here and there, ends of tensors, its end."""
    header = read_header(path)
    first = min(tensor.begin for tensor in header.tensors.values())
    chosen = {*range(8), *range(8, first, max(1, first // 12)), first - 1, path.stat().st_size - 1}
    for begin in begins:
        chosen |= {begin, begin - 1}
    return sorted(chosen)


def _flip_everywhere(
    scenario: Scenario, path: Path, positions: Iterable[int], named: str, options: tuple[str, ...] = ()
) -> None:
    """Change one byte after the other, a different bit each, and require that each change is found."""
    for count, position in enumerate(positions):
        flip_byte(path, position, 1 << count % 8)
        _require_found(scenario, named, options=options)
        flip_byte(path, position, 1 << count % 8)
    _require_sound(scenario, *options)


def test_any_changed_byte_of_a_weight_file_is_found(patched: Scenario) -> None:
    path = patched.working / "model.safetensors"
    begins = [tensor.begin for tensor in read_header(path).tensors.values()]
    _flip_everywhere(patched, path, _positions(path, begins), str(path), ("--weights",))


def test_any_changed_byte_of_an_adapter_is_found(lora_scenario: Scenario) -> None:
    lora_scenario.apply("animals")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = lora_scenario.working / name
        size = path.stat().st_size
        _flip_everywhere(lora_scenario, path, [*range(0, size, size // 15), size - 1], str(path), ("--weights",))


@pytest.mark.parametrize("sequence", [1, 2], ids=["applied", "reverted"])
def test_any_changed_byte_of_a_patch_artifact_is_found(patched: Scenario, sequence: int) -> None:
    path = patched.artifact(sequence)
    begins = [tensor.begin for tensor in read_header(path).tensors.values()]
    _flip_everywhere(patched, path, _positions(path, begins), f"patch {sequence} of line")


def test_any_changed_byte_of_the_exported_heads_is_found(patched: Scenario) -> None:
    heads = patched.workspace.registry.heads
    content = heads.path.read_bytes()
    with patched.workspace.registry.read() as session:
        recorded = list(ledger.events(session))
    unseen = []
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        heads.path.write_bytes(changed)
        if not list(check_ledger(heads.read(), recorded)):
            unseen.append((position, bytes(changed[max(0, position - 20) : position + 20])))
        if position % 150 == 0:
            _require_found(patched, "ledger")
    assert unseen == []
    heads.path.write_bytes(content)
    _require_sound(patched)


class Chain:
    """The ledger's rows in the hands of somebody who owns the database."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        _change(scenario, "UPDATE patches SET reason = reason")  # drops the triggers
        with scenario.workspace.registry.read() as session:
            self.events = [asdict(event) for event in ledger.events(session)]

    def require_found(self, events: list[dict[str, Any]], *named: str) -> None:
        """Put other rows in the ledger's place, and require that this is found."""
        self.write(events)
        _require_found(self._scenario, *named)

    def write(self, events: list[dict[str, Any]]) -> None:
        """Put rows in the ledger's place."""
        with self._scenario.workspace.registry.write() as session:
            session.execute(delete(LedgerEvent))
            session.execute(insert(LedgerEvent), events)


@pytest.fixture
def chain(patched: Scenario) -> Chain:
    return Chain(patched)


@pytest.mark.parametrize("column", ["created_at", "actor", "action", "subject_kind", "subject_name", "payload", "hash"])
def test_any_changed_column_of_any_event_is_found(patched: Scenario, chain: Chain, column: str) -> None:
    for place, event in enumerate(chain.events):
        text = event[column]
        letter = place * 7 % len(text)
        changed = text[:letter] + chr(ord(text[letter]) ^ 1) + text[letter + 1 :]
        edited = [*chain.events[:place], {**event, column: changed}, *chain.events[place + 1 :]]
        chain.require_found(edited, f"event {event['sequence']}")
    chain.write(chain.events)
    _require_sound(patched)


def test_any_missing_event_is_found(chain: Chain) -> None:
    for place, event in enumerate(chain.events[:-1]):
        chain.require_found(chain.events[:place] + chain.events[place + 1 :], f"event {event['sequence']} is missing")


def test_a_ledger_that_ends_early_is_found_wherever_it_ends(chain: Chain) -> None:
    for length in range(1, len(chain.events)):
        chain.require_found(chain.events[:length], f"ends after event {length}", "cut off")


def test_two_events_in_the_other_order_are_found(chain: Chain) -> None:
    for place in range(len(chain.events) - 1):
        first, second = chain.events[place], chain.events[place + 1]
        number = first["sequence"]
        swapped = [{**second, "sequence": number}, {**first, "sequence": number + 1}]
        chain.require_found([*chain.events[:place], *swapped, *chain.events[place + 2 :]], f"event {number}")


def test_a_chain_that_was_computed_anew_is_found_wherever_it_begins(chain: Chain) -> None:
    for place in range(len(chain.events)):
        forged: list[dict[str, Any]] = list(chain.events[:place])
        for event in chain.events[place:]:
            fields = {name: value for name, value in event.items() if name != "hash"}
            fields["previous_hash"] = forged[-1]["hash"] if forged else ledger.GENESIS
            if event is chain.events[place]:
                fields["actor"] = "somebody else"
            forged.append({**fields, "hash": ledger.event_hash(**fields)})
        assert list(ledger.check_chain(ledger.Event(**event) for event in forged)) == []
        chain.require_found(forged, "computed anew", f"event {place + 1}")
