"""An edit, a gap, a truncation and a re-chaining of the ledger are each named."""

import hashlib
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from registry.database import Registry
from registry.errors import LedgerError
from registry.head_lines import Head, check_ledger
from registry.ledger import GENESIS, Event, canonical, check_chain, event_hash, events, is_canonical
from tests.registry.chains import chain, chains, payloads, texts

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)


@given(payload=payloads, actor=texts, name=texts)
def test_the_hash_is_sha256_of_the_canonical_object(payload: dict[str, Any], actor: str, name: str) -> None:
    fields: dict[str, Any] = {
        "sequence": 7, "created_at": "t", "actor": actor, "action": "a", "subject_kind": "k", "subject_name": name,
        "previous_hash": GENESIS,
    }  # fmt: skip
    expected = hashlib.sha256(rfc8785.dumps(fields | {"payload": payload})).hexdigest()
    assert event_hash(**fields, payload=canonical(payload).decode()) == expected


def test_a_hash_that_is_pinned() -> None:
    """Written down, so that a change of the format cannot go unnoticed."""
    (event,) = chain([{"neurons": 3, "ratio": 0.25, "name": "größe"}])
    assert event.hash == "38fa7266c4a8fd6e0c657a9c26151943b5b50eeb9d6e76543b911a67eb8e743c"


@given(payload=payloads)
def test_what_is_canonical_is_recognised(payload: dict[str, Any]) -> None:
    assert is_canonical(canonical(payload).decode())


@pytest.mark.parametrize(
    "payload",
    ['{"a": 1}', '{"b":1,"a":2}', '{"a":1,"a":1}', '{"a":1.0}', '{"a":1e2}', '{"a":"\\u0041"}', "[1]", "1", "", "{",
     '{"a":NaN}', '{"a":-0}', '{"é": 1}', '{"a":1}\n', "[" * 100_000],
)  # fmt: skip
def test_what_is_not_canonical_is_recognised(payload: str) -> None:
    assert not is_canonical(payload)


def _number_of_json(text: str) -> int | float:
    """What RFC 8785 takes an integer for: a double, beyond what a double holds exactly."""
    return int(text) if abs(int(text)) < 2**53 else float(text)


@given(payload=payloads, data=st.data())
def test_the_fast_way_to_recognise_what_is_canonical_agrees_with_rfc_8785(
    payload: dict[str, Any], data: st.DataObject
) -> None:
    number = data.draw(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
    form = data.draw(st.sampled_from(["{!r}", "{:f}", "{:e}", "{:g}", "{:.3f}"]))
    for written in (
        json.dumps(
            payload | {"n": number}, ensure_ascii=data.draw(st.booleans()), sort_keys=True, separators=(",", ":")
        ),
        canonical(payload).decode()[:-1] + ("," if payload else "") + '"\uffff":' + form.format(number) + "}",
    ):
        try:
            expected = rfc8785.dumps(json.loads(written, parse_int=_number_of_json)) == written.encode()
        except (rfc8785.CanonicalizationError, OverflowError):
            expected = False
        assert is_canonical(written) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1: 2}, {3, 4}, b"x"])
def test_a_payload_without_a_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(LedgerError, match="payload"):
        canonical({"value": value})


@given(whole=chains)
def test_a_sound_chain_has_no_violation(whole: list[Event]) -> None:
    assert list(check_chain(whole)) == []


@given(whole=chains, data=st.data())
def test_any_edit_names_the_event(whole: list[Event], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(whole) - 1))
    field = data.draw(st.sampled_from([name for name in Event.__slots__ if name != "sequence"]))
    old = getattr(whole[index], field)
    new = data.draw(texts.filter(lambda value: value != old))
    broken = [*whole]
    broken[index] = replace(whole[index], **{field: new})
    violations = list(check_chain(broken))
    # A changed hash shows at the event itself, whose content has another.
    assert violations
    assert violations[0].sequence == index + 1


@given(whole=chains.filter(lambda made: len(made) > 1), data=st.data())
def test_a_removed_event_is_a_gap(whole: list[Event], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(whole) - 2))
    violations = list(check_chain(whole[:index] + whole[index + 1 :]))
    assert [violation.sequence for violation in violations] == [index + 2]
    assert f"event {index + 1} is missing" in violations[0].problem


@given(whole=chains, data=st.data())
def test_an_event_put_in_is_named(whole: list[Event], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(whole) - 1))
    assert next(check_chain([*whole[: index + 1], *whole[index:]])).sequence == index + 1


def _record(registry: Registry, **changed: Any) -> None:
    fields = {"action": "a", "subject_kind": "k", "subject_name": "n", "payload": {"x": 1}, "actor": "ada"} | changed
    with registry.write() as session:
        registry.record(session, **fields)


def test_events_of_one_transaction_are_chained_and_headed_once(registry: Registry) -> None:
    with registry.write() as session:
        for _ in range(3):
            event = registry.record(
                session, action="a", subject_kind="k", subject_name="n", payload={"z": "ß", "a": 1.5}, actor="ada",
                now=datetime(2026, 1, 2, 5, 4, 5, 6, timezone(timedelta(hours=2))),
            )  # fmt: skip
    with registry.read() as session:
        stored = list(events(session))
        assert list(events(session, after=2)) == stored[2:]
    assert [item.sequence for item in stored] == [1, 2, 3]
    assert stored[0].previous_hash == GENESIS
    assert stored[0].payload == '{"a":1.5,"z":"ß"}'
    assert stored[0].content() == {"z": "ß", "a": 1.5}
    assert stored[0].created_at == "2026-01-02T03:04:05.000006Z"
    assert list(check_ledger(registry.heads.read(), stored)) == []
    assert registry.heads.read() == (Head(3, event.hash, event.created_at),)


def test_a_rolled_back_event_leaves_no_head(registry: Registry) -> None:
    with pytest.raises(ZeroDivisionError), registry.write() as session:  # noqa: PT012
        registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")
        raise ZeroDivisionError
    _record(registry)
    with registry.read() as session:
        assert list(check_ledger(registry.heads.read(), events(session))) == []
    assert len(registry.heads.read()) == 1


@pytest.mark.parametrize("field", ["actor", "action", "subject_kind", "subject_name"])
@pytest.mark.parametrize("value", ["", "a" * 256, "a\0b", "\udcff"])
def test_a_field_that_a_database_would_refuse_is_named(sqlite_registry: Registry, field: str, value: str) -> None:
    with pytest.raises(LedgerError, match=field):
        _record(sqlite_registry, **{field: value})


FORGED = "VALUES ({}, 't', 'eve', 'a', 'k', 'n', '{{}}', '{}', 'h')"
COLUMNS = (
    "ledger_events (sequence, created_at, actor, action, subject_kind, subject_name, payload, previous_hash, hash)"
)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_events SET actor = 'eve' WHERE sequence = 2",
        "UPDATE ledger_events SET sequence = 9 WHERE sequence = 2",
        "DELETE FROM ledger_events WHERE sequence = 3",
        "DELETE FROM ledger_events",
        pytest.param("TRUNCATE ledger_events", id="postgresql-truncate"),
        pytest.param(f"INSERT OR REPLACE INTO {COLUMNS} {FORGED.format(2, GENESIS)}", id="sqlite-replace"),
        pytest.param("UPDATE OR REPLACE ledger_events SET sequence = 2 WHERE sequence = 3", id="sqlite-update-replace"),
        pytest.param(f"INSERT INTO {COLUMNS} {FORGED.format(2, GENESIS)}", id="second"),
        pytest.param(f"INSERT INTO {COLUMNS} {FORGED.format(5, GENESIS)}", id="gap"),
        pytest.param(f"INSERT INTO {COLUMNS} {FORGED.format(4, GENESIS)}", id="unchained"),
        pytest.param(f"INSERT INTO {COLUMNS} {FORGED.format(0, GENESIS)}", id="before-the-first"),
        pytest.param(
            f"INSERT INTO {COLUMNS} {FORGED.format(2, GENESIS)} ON CONFLICT (sequence) DO UPDATE SET actor = 'eve'",
            id="upsert",
        ),
    ],
)
def test_raw_sql_cannot_change_the_ledger(registry: Registry, statement: str) -> None:
    for _ in range(3):
        _record(registry)
    with registry.read() as session:
        before = list(events(session))
    engine = registry.engine.execution_options(neuronledger_mode="write")
    with pytest.raises(DBAPIError), engine.begin() as connection:
        connection.exec_driver_sql(statement)
    with registry.read() as session:
        assert list(events(session)) == before


@pytest.mark.parametrize("statement", ["UPDATE ledger_events SET actor = 'eve'", "DELETE FROM ledger_events"])
def test_a_session_that_changes_the_ledger_gets_our_error(registry: Registry, statement: str) -> None:
    _record(registry)
    with pytest.raises(LedgerError, match="append-only"), registry.write() as session:
        session.execute(text(statement))


def test_with_the_trigger_dropped_the_chain_still_names_the_event(registry: Registry) -> None:
    for _ in range(3):
        _record(registry)
    sqlite = registry.engine.dialect.name == "sqlite"
    drop = (
        "DROP TRIGGER ledger_events_no_update" if sqlite else "DROP TRIGGER ledger_events_append_only ON ledger_events"
    )
    with registry.write() as session:
        session.execute(text(drop))
        session.execute(text("UPDATE ledger_events SET payload = :forged WHERE sequence = 2"), {"forged": '{"x":2}'})
    with registry.read() as session:
        assert [violation.sequence for violation in check_chain(events(session))] == [2]


def test_events_are_checked_at_thousands_a_second() -> None:
    payload = {"lineage": "assistant", "patch": 3, "digest_before": "a" * 64, "neurons": 1691, "share": 0.25}
    whole = chain([payload] * 20_000)
    began = time.process_time()
    assert list(check_chain(whole)) == []
    assert time.process_time() - began < 5


def test_an_exported_event_is_checked_without_the_database() -> None:
    whole = chain([{"x": 1}, {"y": 2}])
    lines = [json.dumps({name: getattr(event, name) for name in Event.__slots__}) for event in whole]
    assert list(check_chain(Event(**json.loads(line)) for line in lines)) == []
