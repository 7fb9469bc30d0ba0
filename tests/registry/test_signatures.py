"""Signed heads: any change of a signed line is a forgery, and who signed is told apart."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.database import Registry
from registry.errors import KeyFileError
from registry.head_lines import Head, check_heads, check_ledger, parse_lines
from registry.keys import PrivateKey
from registry.ledger import events
from registry.signatures import SignedBy, check_signatures, is_signed, sign_head, signed_bytes
from tests.registry.chains import chain

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()
AT = "2026-01-02T03:04:05.000006Z"


@pytest.fixture
def signing(registry_url: str, registry_directory: Path) -> Iterator[Registry]:
    """An open registry that signs every head, on both databases."""
    signer = partial(partial, sign_head, key=KEY)
    with Registry.open(registry_url, directory=registry_directory, signer=signer) as registry:
        yield registry


def _record(registry: Registry) -> None:
    with registry.write() as session:
        registry.record(session, action="a", subject_kind="k", subject_name="n", payload={}, actor="ada")


def test_what_is_signed_is_pinned() -> None:
    """Written down, so that a change of the format cannot go unnoticed."""
    head = Head(14, "ab" * 32, AT, 12, key="cd" * 32, signature="ef" * 64)
    assert signed_bytes(head) == (
        b'neuronledger ledger head v1\n{"after":12,"at":"2026-01-02T03:04:05.000006Z","count":14,"hash":"'
        + b"ab" * 32 + b'","key":"' + b"cd" * 32 + b'"}'
    )  # fmt: skip


def test_every_head_is_signed_where_a_key_is_set(signing: Registry) -> None:
    for _ in range(3):
        _record(signing)
    with signing.read_with_heads() as (session, lines):
        assert list(check_ledger(lines, events(session))) == []
    assert all(isinstance(line, Head) and is_signed(line) for line in lines)
    found = check_signatures(lines, [KEY.public])
    assert found.problems == ()
    assert found.signed_by == (SignedBy(KEY.public.fingerprint, 3, 1, 3, trusted=True),)
    assert found.last == 3


def test_a_head_that_recovery_completes_is_signed_too(signing: Registry) -> None:
    _record(signing)
    signing.heads.path.unlink()
    assert signing.complete_heads()
    (line,) = signing.heads.read()
    assert isinstance(line, Head)
    assert is_signed(line)


def test_nothing_is_committed_where_the_key_cannot_be_read(sqlite_registry: Registry) -> None:
    def signer() -> None:
        raise KeyFileError("the key is gone", "bring it back")

    broken = replace(sqlite_registry, signer=signer)
    with pytest.raises(KeyFileError):
        _record(broken)
    with broken.read() as session:
        assert list(events(session)) == []
    _record(sqlite_registry)
    assert not broken.complete_heads()  # nothing to sign, so the key is not asked for


def _signed(count: int, key: PrivateKey = KEY, after: int = 0) -> Head:
    return sign_head(Head(count, "ab" * 32, AT, after), key)


@given(data=st.data())
def test_any_changed_field_of_a_signed_line_is_a_forgery(data: st.DataObject) -> None:
    head = _signed(7)
    digits = st.text("0123456789abcdef", min_size=64, max_size=64)
    changes = {
        "count": st.integers(1, 10**15 - 1), "after": st.integers(0, 10**15 - 1), "hash": digits, "key": digits,
        "at": st.just("2026-01-02T03:04:05.000007Z"), "signature": st.tuples(digits, digits).map("".join),
    }  # fmt: skip
    field = data.draw(st.sampled_from(sorted(changes)))
    changed = replace(head, **{field: data.draw(changes[field].filter(lambda value: value != getattr(head, field)))})
    assert is_signed(head)
    (problem,) = check_signatures([changed]).problems
    assert "line 1" in problem.problem
    assert "forged signature" in problem.problem


def test_every_flipped_bit_of_a_file_with_signed_lines_is_found_without_any_key() -> None:
    whole = chain([{}] * 5)
    made: list[Head] = []
    for count, key in ((2, None), (3, KEY), (5, OTHER)):
        head = Head(count, whole[count - 1].hash, whole[count - 1].created_at, made[-1].count if made else 0)
        made.append(sign_head(head, key) if key else head)
    content = b"".join(head.line().encode() + b"\n" for head in made)
    unseen = []
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        lines = parse_lines(bytes(changed))
        if not list(check_heads(lines, whole)) and not check_signatures(lines).problems:
            unseen.append(position)
    assert unseen == []


def test_a_signature_moved_to_another_head_is_a_forgery() -> None:
    first, second = _signed(3), Head(5, "cd" * 32, AT, 3)
    moved = replace(second, key=first.key, signature=first.signature)
    (problem,) = check_signatures([first, moved]).problems
    assert problem.sequence == 5


def test_a_key_that_is_not_among_those_given_is_foreign() -> None:
    lines = [_signed(3), _signed(5, OTHER, 3), Head(6, "ab" * 32, AT, 5)]
    anybody = check_signatures(lines)
    assert (anybody.problems, anybody.heads, anybody.last) == ((), 2, 5)
    found = check_signatures(lines, [KEY.public])
    (problem,) = found.problems
    assert "foreign signature" in problem.problem
    assert OTHER.public.fingerprint in problem.problem
    assert found.last == 3
    assert check_signatures(lines, [KEY.public, OTHER.public]).problems == ()


def test_a_forged_signature_counts_for_nobody() -> None:
    found = check_signatures([replace(_signed(3), count=4)], [KEY.public])
    assert found.signed_by == (SignedBy(KEY.public.fingerprint, 0, None, None, trusted=True),)
    assert found.last == 0
