"""Whatever is done to a file of heads, or to the ledger behind it, one check names it."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from registry.head_lines import Head, Line, MalformedHead, check_heads, check_ledger, parse_line, parse_lines
from registry.ledger import Event, Violation, check_chain
from tests.registry.chains import chain, chains, rechained


@dataclass(frozen=True)
class Exported:
    """A ledger and the head file of its commits."""

    events: list[Event]
    lines: list[bytes]

    @property
    def content(self) -> bytes:
        return b"".join(self.lines)

    def check(self, content: bytes, *, whole: bool = True) -> list[Violation]:
        return list(check_heads(parse_lines(content), self.events, whole=whole))


def heads_of(events: list[Event], counts: list[int]) -> list[Line]:
    """The heads after commits that ended with these events."""
    afters = [0, *counts]
    chosen = [(events[count - 1], after) for count, after in zip(counts, afters, strict=False)]
    return [Head(event.sequence, event.hash, event.created_at, after) for event, after in chosen]


def exported(events: list[Event], counts: list[int]) -> Exported:
    return Exported(
        events, [head.line().encode() + b"\n" for head in heads_of(events, counts) if isinstance(head, Head)]
    )


@st.composite
def commits(draw: st.DrawFn) -> Exported:
    """A ledger of at least three commits, each of one or more events."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=3, max_size=6))
    return exported(chain([{}] * sum(sizes)), [sum(sizes[: number + 1]) for number in range(len(sizes))])


def all_heads(whole: list[Event]) -> list[Line]:
    return heads_of(whole, [event.sequence for event in whole])


@given(made=commits())
def test_what_nobody_touched_agrees(made: Exported) -> None:
    assert made.check(made.content) == []
    assert made.check(made.content, whole=False) == []
    assert list(check_ledger(parse_lines(made.content), made.events)) == []


def test_a_line_that_is_pinned() -> None:
    """Written down, so that a change of the format cannot go unnoticed."""
    (first, second) = exported(chain([{}, {"x": 1}]), [1, 2]).lines
    assert first.startswith(b'{"after":0,"at":"2026-01-02T03:04:05.000006Z","count":1,"hash":"')
    assert second.startswith(b'{"after":1,"at":"2026-01-02T03:04:05.000006Z","count":2,"hash":"')
    assert rfc8785.dumps(json.loads(second)) + b"\n" == second


@given(made=commits(), data=st.data())
def test_any_changed_byte_is_named(made: Exported, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(made.content) - 1))
    content = bytearray(made.content)
    content[position] ^= data.draw(st.integers(1, 255))
    assert made.check(bytes(content))


def test_every_flipped_bit_of_a_file_is_named() -> None:
    made = exported(chain([{}] * 14), [2, 9, 10, 14])
    unseen = []
    for position in range(len(made.content)):
        for bit in range(8):
            content = bytearray(made.content)
            content[position] ^= 1 << bit
            if not made.check(bytes(content)):
                unseen.append((position, bit))
    assert unseen == []


@given(made=commits(), data=st.data())
def test_any_byte_put_in_or_taken_out_is_named(made: Exported, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(made.content) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=2))
    assert made.check(made.content[:position] + byte + made.content[position:])
    assert made.check(made.content + byte)
    assert made.check(made.content[:position] + made.content[position + 1 :])


@given(made=commits(), data=st.data())
def test_any_removed_lines_are_named(made: Exported, data: st.DataObject) -> None:
    removed = data.draw(st.sets(st.integers(0, len(made.lines) - 1), min_size=1))
    kept = [line for number, line in enumerate(made.lines) if number not in removed]
    problems = [violation.problem for violation in made.check(b"".join(kept))]
    assert any("is missing" in problem or "were removed" in problem or "are missing" in problem for problem in problems)


@given(made=commits(), data=st.data())
def test_any_other_order_is_named(made: Exported, data: st.DataObject) -> None:
    order = data.draw(st.permutations(made.lines).filter(lambda lines: lines != made.lines))
    problems = [violation.problem for violation in made.check(b"".join(order))]
    assert any("out of order" in problem for problem in problems)


@given(made=commits(), data=st.data())
def test_any_repeated_line_is_named(made: Exported, data: st.DataObject) -> None:
    source, place = data.draw(st.tuples(*[st.integers(0, len(made.lines) - 1)] * 2))
    lines = [*made.lines[:place], made.lines[source], *made.lines[place:]]
    assert any("repeated" in violation.problem for violation in made.check(b"".join(lines)))


@given(made=commits(), data=st.data())
def test_any_truncation_is_named(made: Exported, data: st.DataObject) -> None:
    assert made.check(made.content[: data.draw(st.integers(0, len(made.content) - 1))])


@given(made=commits(), data=st.data())
def test_a_line_of_another_event_that_was_put_in_is_named(made: Exported, data: st.DataObject) -> None:
    """Even one that the ledger agrees with, and that names the line before it rightly: the next one does not."""
    heads = [line for line in parse_lines(made.content) if isinstance(line, Head)]
    free = sorted({event.sequence for event in made.events} - {head.count for head in heads})
    if not free:
        return
    event = made.events[data.draw(st.sampled_from(free)) - 1]
    place = next(number for number, head in enumerate(heads) if head.count > event.sequence)
    more = Head(event.sequence, event.hash, event.created_at, heads[place].after)
    lines = [*heads[:place], more, *heads[place:]]
    (violation,) = check_heads(lines, made.events)
    assert "a line was put in" in violation.problem


@given(whole=chains, data=st.data())
def test_a_truncated_ledger_is_seen_by_the_heads_alone(whole: list[Event], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(whole) - 1))
    assert list(check_chain(whole[:kept])) == []
    (violation,) = check_ledger(all_heads(whole), whole[:kept])
    assert violation.sequence == kept + 1
    assert "cut off" in violation.problem


@given(whole=chains, data=st.data())
def test_a_rechaining_is_seen_by_the_heads_alone(whole: list[Event], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(whole) - 1))
    edited = [*whole]
    edited[index] = replace(whole[index], actor="eve")
    forged = rechained(edited)
    assert list(check_chain(forged)) == []
    violations = list(check_ledger(all_heads(whole), forged))
    assert [violation.sequence for violation in violations] == list(range(index + 1, len(whole) + 1))


@given(made=commits(), data=st.data())
def test_a_ledger_forged_from_the_first_event_on_is_seen_by_any_kept_line(made: Exported, data: st.DataObject) -> None:
    """The forger has computed the chain and the head file anew; one line out of his reach is enough."""
    edited = rechained([replace(made.events[0], actor="eve"), *made.events[1:]])
    counts = [head.count for head in parse_lines(made.content) if isinstance(head, Head)]
    forged = exported(edited, counts)
    assert forged.check(forged.content) == []
    assert list(check_chain(edited)) == []
    kept = data.draw(st.sampled_from(made.lines))
    (violation,) = forged.check(kept, whole=False)
    assert "computed anew" in violation.problem


@given(made=commits(), data=st.data())
def test_a_kept_copy_may_begin_later_end_earlier_and_lack_lines(made: Exported, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, len(made.lines) - 1)))
    content = b"".join(line for number, line in enumerate(made.lines) if number in kept)
    assert made.check(content, whole=False) == []


@given(made=commits(), data=st.data())
def test_a_kept_copy_in_another_order_is_named(made: Exported, data: st.DataObject) -> None:
    order = data.draw(st.permutations(made.lines).filter(lambda lines: lines != made.lines))
    assert made.check(b"".join(order), whole=False)


def _messages(lines: list[Line], events: list[Event]) -> list[str]:
    return [violation.problem for violation in check_heads(lines, events)]


def test_a_ledger_that_goes_on_after_the_last_head_is_told_with_the_mend() -> None:
    whole = chain([{}] * 5)
    (message,) = _messages(heads_of(whole, [1, 3]), whole)
    assert message == (
        "the ledger has 5 events, but the last head is of event 3: lines were removed, or a process died between "
        "commit and head; `neuronledger recover` completes it"
    )
    (message,) = _messages([], whole)
    assert "the exported heads are missing" in message
    assert _messages([], []) == []


def test_each_fault_names_the_line_and_the_event() -> None:
    whole = chain([{}] * 6)
    first, second, third = heads_of(whole, [2, 3, 6])
    assert _messages([first, third], whole) == [
        "line 2 of the ledger head file, the head of event 6, comes after the head of event 3, and that line is missing"
    ]
    assert _messages([second, third], whole) == [
        "line 1 of the ledger head file, the head of event 3, comes after the head of event 2, and that line is missing"
    ]
    (repeated,) = _messages([first, first, second, third], whole)
    assert repeated == (
        "line 2 of the ledger head file, the head of event 2, is repeated or out of order: "
        "a line before it is of event 2"
    )
    assert _messages([first, replace(second, after=3), third], whole)[0] == (
        "line 2 of the ledger head file, the head of event 3, says that it comes after event 3"
    )
    assert _messages([first, replace(second, at="2020-01-01T00:00:00.000000Z"), third], whole) == [
        "the head that was kept of event 3 gives another time: '2020-01-01T00:00:00.000000Z'"
    ]


def test_a_file_of_an_earlier_version_is_one_finding_that_says_what_to_do() -> None:
    whole = chain([{}] * 3)
    old = "".join(f'{{"at":"{e.created_at}","count":{e.sequence},"hash":"{e.hash}"}}\n' for e in whole)
    messages = _messages(list(parse_lines(old.encode())), whole)
    assert len(messages) == 2
    assert messages[0].startswith("each of the lines 1 to 3 of the ledger head file is a head of an earlier version")
    assert "keep the file elsewhere, and `neuronledger recover` begins a new one" in messages[0]
    assert "no line of it can be read" in messages[1]


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0}, {"count": True}, {"count": 2.0}, {"count": "2"}, {"count": 10**15}, {"after": -1},
        {"after": None}, {"hash": "A" * 64}, {"hash": "a" * 63}, {"at": "2026-01-02T03:04:05Z"}, {"at": ""},
        {"key": "0" * 64}, {"signature": "0" * 128}, {"key": "0" * 64, "signature": "0" * 127}, {"x": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_with_other_fields_is_no_head(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"after": 1, "at": "2026-01-02T03:04:05.000006Z", "count": 2, "hash": "a" * 64}
    assert isinstance(parse_line(rfc8785.dumps(fields)), Head)
    assert isinstance(
        parse_line(json.dumps(fields | change, separators=(",", ":"), sort_keys=True).encode()), MalformedHead
    )


@pytest.mark.parametrize("line", [b"", b"[]", b"1", b"{", b"{}", b"\xff", b"null", b" "])
def test_a_line_that_is_no_object_is_no_head(line: bytes) -> None:
    assert isinstance(parse_line(line), MalformedHead)


@pytest.mark.parametrize("edit", [(b":", b": "), (b'{"', b'{ "'), (b'"count":2', b'"count":02'), (b"}", b"}\r")])
def test_a_line_in_another_form_of_json_is_no_head(edit: tuple[bytes, bytes]) -> None:
    line = Head(2, "a" * 64, "2026-01-02T03:04:05.000006Z", 1).line().encode()
    assert isinstance(parse_line(line.replace(*edit, 1)), MalformedHead)


@given(data=st.data())
def test_every_head_reads_back_as_what_it_was(data: st.DataObject) -> None:
    digits = st.text("0123456789abcdef", min_size=64, max_size=64)
    signed = data.draw(st.booleans())
    head = Head(
        count=data.draw(st.integers(1, 10**15 - 1)),
        hash=data.draw(digits),
        at="2026-01-02T03:04:05.000006Z",
        after=data.draw(st.integers(0, 10**15 - 1)),
        key=data.draw(digits) if signed else None,
        signature=data.draw(digits) * 2 if signed else None,
    )
    assert parse_line(head.line().encode()) == head
    assert rfc8785.dumps(head.fields()) == head.line().encode()
