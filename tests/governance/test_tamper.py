"""Whatever is edited in SQL behind the ledger's back, in any table, `audit verify` finds, and names the record.

No column is left out but those of `alembic_version`, without which no registry is opened, and of a lock while a patch
is being written: it is gone when that is done.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from sqlalchemy import text, update

from algorithms.judges import RefusalPhraseJudge
from governance import measuring
from governance.auditing import verify
from governance.evaluation import EvaluationRequest, evaluate
from governance.measuring import GenerationSettings
from governance.prompt_sets import PromptSource
from governance.workspace import Workspace
from registry import ledger, queries
from registry.database import Registry
from registry.record_digests import KINDS
from registry.schema import Base, LedgerEvent, Patch, SafetyDimension
from tests.databases import PostgreSQLDatabases, SQLiteDatabases
from tests.fault_tally import EditTally
from tests.governance.conftest import Trios
from tests.governance.faults import flip_byte
from tests.governance.governed import TUNED, govern
from tests.governance.scenarios import Scenario, events_of
from tests.governance.tampering import Attacker, Edit, edits


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory,
    sqlite_databases: SQLiteDatabases,
    trios: Trios,
    continued: Trios,
    prompts: Path,
) -> tuple[Path, Path]:
    """Where a governed registry in SQLite has to lie, and a copy to put there."""
    place = tmp_path_factory.mktemp("governed") / "registry"
    with Registry.open(sqlite_databases.migrated(place)) as registry:
        govern(Workspace(registry=registry, actor="tester"), trios, continued, prompts, place.parent)
    copy = place.with_name("copy")
    shutil.copytree(place, copy)
    return place, copy


@pytest.fixture
def governed_sqlite(pristine: tuple[Path, Path]) -> Iterator[Workspace]:
    """In SQLite."""
    place, copy = pristine
    shutil.rmtree(place)
    shutil.copytree(copy, place)
    with Registry.open(f"sqlite:///{place / 'registry.db'}") as registry:
        yield Workspace(registry=registry, actor="tester")


@pytest.fixture
def governed_postgresql(
    postgresql_databases: PostgreSQLDatabases, tmp_path: Path, trios: Trios, continued: Trios, prompts: Path
) -> Iterator[Workspace]:
    """In PostgreSQL."""
    with Registry.open(postgresql_databases.migrated(tmp_path), directory=tmp_path / "registry") as registry:
        yield govern(Workspace(registry=registry, actor="tester"), trios, continued, prompts, tmp_path)
    postgresql_databases.clean()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def governed(request: pytest.FixtureRequest) -> Workspace:
    """On both databases."""
    workspace: Workspace = request.getfixturevalue(f"governed_{request.param}")
    return workspace


def names(edit: Edit, subjects: set[str]) -> bool:
    """Whether one of the subjects of findings is what was edited."""
    return not subjects.isdisjoint(edit.named)


def test_any_edit_of_any_column_or_row_is_found_and_named(governed: Workspace, edit_tally: EditTally) -> None:
    """With PostgreSQL, where every question is a round trip, in fewer rows."""
    rows = 2 if governed.registry.engine.dialect.name == "sqlite" else 1
    tried: Counter[str] = Counter()
    unnoticed = []
    with Attacker.of(governed) as attacker:
        assert verify(attacker.workspace).findings == ()
        for edit in edits(attacker, random.Random(7), rows):
            findings = attacker.findings(edit)
            if findings is None:
                continue
            tried[edit.table] += 1
            if not names(edit, {finding.subject for finding in findings}):
                unnoticed.append((edit.what, findings))
        assert verify(attacker.workspace).findings == ()
    edit_tally.edits += tried.total()
    edit_tally.unnoticed += len(unnoticed)
    assert unnoticed == []
    assert tried.keys() == Base.metadata.tables.keys()
    assert tried.total() >= 340 * rows


def test_any_changed_byte_of_any_artifact_is_found_and_named(governed_sqlite: Workspace, edit_tally: EditTally) -> None:
    store, chosen = governed_sqlite.store, random.Random(7)
    unnoticed = []
    for digest in store.list():
        path = store.path(digest)
        size = path.stat().st_size
        for position in {0, size - 1, chosen.randrange(size)}:
            bit = 1 << chosen.randrange(8)
            flip_byte(path, position, bit)
            found = [finding for finding in verify(governed_sqlite).findings if finding.check == "artifact"]
            edit_tally.edits += 1
            told = {digest in finding.problem for finding in found}  # one finding for each record that rests on it
            if told != {True} or len({finding.subject for finding in found}) < len(found):
                unnoticed.append((digest, position, found))
            flip_byte(path, position, bit)
    edit_tally.unnoticed += len(unnoticed)
    assert unnoticed == []


def test_a_lineage_alone_is_told_of_its_own_records_only(governed_sqlite: Workspace) -> None:
    own = {"patches", "patch_modules", "identifications", "layer_scores", "evaluations", "lineage_tensors"}
    told = Counter[str]()
    with Attacker.of(governed_sqlite) as attacker:
        for name in ("line", TUNED):
            assert verify(attacker.workspace, lineage=name).findings == ()
        tried = [edit for edit in edits(attacker, random.Random(3), 1) if edit.table in own]
        for edit in random.Random(3).sample(tried, 40):
            found = {name: attacker.findings(edit, lineage=name) or () for name in ("line", TUNED)}
            concerned = [name for name in found if names(edit, {finding.subject for finding in found[name]})]
            assert concerned or found["line"] == (), edit.what
            told.update(concerned if len(concerned) == 1 else ())
            moved = "_id of" in edit.what  # a row that goes from one record to another concerns both
            if (
                len(concerned) == 1
                and not moved
                and not any("no such row" in finding.problem for finding in found[concerned[0]])
            ):
                assert [name for name in found if found[name]] == concerned, edit.what
    assert min(told["line"], told[TUNED]) > 10


def test_an_edit_stays_found_when_a_later_event_moves_the_record(governed_sqlite: Workspace) -> None:
    """The revert's event takes the edited reason and the edited digest of a tensor into its digests."""
    with governed_sqlite.registry.write() as session:
        session.execute(update(Patch).where(Patch.sequence == 3).values(reason="a better reason"))
        session.execute(text("UPDATE lineage_files SET modified_ns = modified_ns + 1 WHERE lineage_id = 2"))
    Scenario(governed_sqlite, None, "line").revert(3)  # type: ignore[arg-type]
    Scenario(governed_sqlite, None, TUNED).revert(2)  # type: ignore[arg-type]
    edited = [finding.subject for finding in verify(governed_sqlite).findings if "edited after" in finding.problem]
    assert edited == ["lineage tuned", "patch 3 of line"]


def test_records_from_before_the_ledger_held_digests_are_counted_and_compared_in_words(
    governed_sqlite: Workspace,
) -> None:
    _forget_digests(governed_sqlite, before=10**6)
    outcome = verify(governed_sqlite)
    assert outcome.findings == ()
    counts = "5 models, 4 dimensions, 10 prompt sets, 2 lineages, 6 identifications, 5 patches, 8 evaluations"
    assert outcome.not_checked[0] == f"every column of {counts}, recorded before the ledger held digests of records"
    with governed_sqlite.registry.write() as session:
        session.execute(update(Patch).where(Patch.id == 1).values(neurons_modified=1))
        session.execute(update(SafetyDimension).values(description="another"))
    assert {finding.subject for finding in verify(governed_sqlite).findings} == {"patch 1 of line"}


def test_what_is_recorded_after_older_records_has_digests(governed_sqlite: Workspace) -> None:
    with governed_sqlite.registry.read() as session:
        last = max(event.sequence for event in ledger.events(session))
    _forget_digests(governed_sqlite, before=last)
    scenario = Scenario(governed_sqlite, None, "line")  # type: ignore[arg-type]
    scenario.revert(3)
    outcome = verify(governed_sqlite)
    assert outcome.findings == ()
    assert "1 lineages, 6 identifications, 4 patches, 6 evaluations" in outcome.not_checked[0]
    with governed_sqlite.registry.write() as session:
        session.execute(update(Patch).where(Patch.sequence == 3).values(rows_unchanged=7))
    assert "patch 3 of line" in {finding.subject for finding in verify(governed_sqlite).findings}


def test_the_event_of_an_evaluation_holds_digests_of_prompts_and_judge(governed_sqlite: Workspace) -> None:
    told = [content for action, content in events_of(governed_sqlite) if action == "evaluation.recorded"]
    with governed_sqlite.registry.read() as session:
        digests = {prompt_set.id: prompt_set.digest for prompt_set in queries.prompt_sets(session)}
        figures = [
            record
            for name in ("line", TUNED)
            for record in queries.evaluations(session, queries.lineage_id(session, name))
        ]
    assert [figure["prompts"] for content in told for figure in content["figures"]] == [
        digests[figure.prompt_set_id or 0] for figure in figures
    ]
    judged = [figure for content in told for figure in content["figures"] if "judge" in figure]
    assert judged
    assert {figure["judge_digest"] for figure in judged} == {RefusalPhraseJudge().digest}
    assert {f"evaluation {figure.id}" for figure in figures} <= {
        name for content in told for name in content["records"]
    }


def test_prompts_of_an_evaluation_that_fails_leave_no_record(
    governed_sqlite: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "what is a cake ?", "answer": "good"}) + "\n")
    more = {"more": PromptSource(str(tmp_path / "more.jsonl"), answer_column="answer")}
    monkeypatch.setattr(measuring, "answer_batches", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(governed_sqlite, "line", EvaluationRequest(accuracy=more, generation=GenerationSettings(2)))
    outcome = verify(governed_sqlite)
    assert (outcome.findings, outcome.checked["prompt sets"]) == ((), 10)


def test_every_table_is_part_of_a_record_or_compared_otherwise() -> None:
    parts = {owner.class_.__tablename__ for kind in KINDS for owner in (kind.row.id, *kind.parts)}
    otherwise = {"protected_neurons", "lineage_locks", "ledger_events"}
    assert parts | otherwise == Base.metadata.tables.keys()
    assert not parts & otherwise


def _forget_digests(workspace: Workspace, before: int) -> None:
    """Rewrite the ledger as an older version would have written it, up to an event."""
    with workspace.registry.write() as session:
        for name in ("ledger_events_no_update", "ledger_events_continue"):
            session.execute(text(f"DROP TRIGGER {name}"))
        previous = ledger.GENESIS
        for event in list(ledger.events(session)):
            content = event.content()
            if event.sequence < before and event.action != "judge.trained":  # no older version trained judges
                content = {name: value for name, value in content.items() if not name.startswith("records")}
            fields = {
                **{name: getattr(event, name) for name in ("sequence", "created_at", "actor", "action")},
                "subject_kind": event.subject_kind,
                "subject_name": event.subject_name,
                "payload": ledger.canonical(content).decode(),
                "previous_hash": previous,
            }
            previous = ledger.event_hash(**fields)
            rewritten = update(LedgerEvent).where(LedgerEvent.sequence == event.sequence)
            session.execute(rewritten.values(**fields, hash=previous))
    workspace.registry.heads.path.unlink()
    workspace.registry.complete_heads()
