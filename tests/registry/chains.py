"""Sound ledgers that are not in any database, and the ones that a forger makes of them."""

from typing import Any

from hypothesis import strategies as st

from registry.ledger import GENESIS, Event, canonical, event_hash


def chain(payloads: list[dict[str, Any]]) -> list[Event]:
    """A sound chain with these payloads."""
    made: list[Event] = []
    for sequence, payload in enumerate(payloads, start=1):
        fields: dict[str, Any] = {
            "sequence": sequence,
            "created_at": "2026-01-02T03:04:05.000006Z",
            "actor": "ada",
            "action": "patch.applied",
            "subject_kind": "patch",
            "subject_name": f"assistant/{sequence}",
            "payload": canonical(payload).decode(),
            "previous_hash": made[-1].hash if made else GENESIS,
        }
        made.append(Event(**fields, hash=event_hash(**fields)))
    return made


def rechained(broken: list[Event]) -> list[Event]:
    """The chain that somebody makes who edits events and computes all hashes anew."""
    made: list[Event] = []
    for sequence, event in enumerate(broken, start=1):
        fields = {name: getattr(event, name) for name in Event.__slots__ if name != "hash"}
        fields |= {"sequence": sequence, "previous_hash": made[-1].hash if made else GENESIS}
        made.append(Event(**fields, hash=event_hash(**fields)))
    return made


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
payloads = st.dictionaries(
    texts,
    st.recursive(
        scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_size=4,
)
chains = st.lists(payloads, min_size=1, max_size=5).map(chain)
