"""What verifying the ledger costs, beside hashing the same bytes once.

    python benchmarks/ledger.py --events 100000 [--signed] [--json FILE]

Writes a ledger of N events to an SQLite registry in a temporary directory, one commit and so one exported head for
each, as bulk inserts (how events are written by commands is not measured here), and measures `verify` of the whole. The
payload is like that of an applied patch. Beside it, the plain baseline: the same events read by the same query, and the
SHA-256 of their text, once; that reads and hashes what a check has to read and hash, and checks nothing.

Both are timed in this process after imports, best of three, with the database in the page cache: seconds by the clock,
and seconds of the processor, which say more on a machine that does other work too.
"""

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import insert

from governance.auditing import verify
from governance.workspace import Workspace
from registry.database import Registry
from registry.head_lines import Head
from registry.keys import PrivateKey
from registry.ledger import GENESIS, canonical, event_hash, events
from registry.schema import LedgerEvent
from registry.signatures import sign_head

Result = TypeVar("Result")


class Taken(NamedTuple):
    """Seconds by the clock, and of the processor."""

    clock: float
    processor: float


ROUNDS = 3
_BATCH = 5000


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the ledger, measure, print; 1 if verification took longer than was wanted."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as place:
        url = f"sqlite:///{Path(place) / 'registry.db'}"
        with Registry.open(url, create=True) as registry:
            _fill(registry, options.events, PrivateKey.generate() if options.signed else None)
            size = registry.heads.path.stat().st_size
            hashed, baseline = _best(lambda: _read_and_hash(registry))
            outcome, seconds = _best(lambda: verify(Workspace(registry, "benchmark")))
    if not outcome.verified:
        print(*outcome.findings, sep="\n")
        return 1
    print(f"{options.events:,} events ({hashed:,} bytes), as many {'signed ' * options.signed}heads ({size:,} bytes)")
    for what, taken in (("verify", seconds), ("read the events and hash them once", baseline)):
        print(f"{what:36}{taken.clock:6.2f} s, {taken.processor:6.2f} s of the processor")
    holds = seconds.clock < options.wanted
    print(f"{'holds' if holds else 'FAILS'}: verified in less than {options.wanted:g} s")
    if options.json:
        measured = {
            "events": options.events, "signed": options.signed, "event_bytes": hashed, "head_bytes": size,
            "verify": seconds._asdict(), "read_and_hash": baseline._asdict(), "python": platform.python_version(),
            "machine": platform.machine(),
        }  # fmt: skip
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    return 0 if holds else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--signed", action="store_true", help="sign every head")
    parser.add_argument("--wanted", type=float, default=5.0, help="seconds")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _payload(number: int) -> dict[str, Any]:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return {
        "lineage": "assistant", "patch": number, "dimension": "terrorism", "artifact": digest,
        "digest_before": digest[::-1], "digest_after": digest, "neurons_modified": 1691,
        "parameters_modified": 6_926_336, "share": 0.0125, "reason": "request 4711",
    }  # fmt: skip


def _rows(count: int) -> Iterator[dict[str, Any]]:
    previous_hash = GENESIS
    for sequence in range(1, count + 1):
        fields: dict[str, Any] = {
            "sequence": sequence,
            "created_at": f"2026-01-02T03:04:05.{sequence % 1_000_000:06d}Z",
            "actor": "ada",
            "action": "measured.change",
            "subject_kind": "patch",
            "subject_name": f"assistant/{sequence}",
            "payload": canonical(_payload(sequence)).decode(),
            "previous_hash": previous_hash,
        }
        previous_hash = event_hash(**fields)
        yield {**fields, "hash": previous_hash}


def _fill(registry: Registry, count: int, key: PrivateKey | None) -> None:
    """Write the events, and the heads that as many commits would have left."""
    rows = list(_rows(count))
    with registry.write() as session:
        for begin in range(0, count, _BATCH):
            session.execute(insert(LedgerEvent), rows[begin : begin + _BATCH])
    with registry.heads.path.open("w", encoding="ascii") as file:
        for row in rows:
            head = Head(row["sequence"], row["hash"], row["created_at"], row["sequence"] - 1)
            file.write((sign_head(head, key) if key else head).line() + "\n")


def _read_and_hash(registry: Registry) -> int:
    """Read every event and hash its text once; how many bytes that were."""
    digest, size = hashlib.sha256(), 0
    with registry.read() as session:
        for event in events(session):
            parts = (event.created_at, event.actor, event.action, event.subject_kind, event.subject_name)
            text = "".join((*parts, event.payload)).encode()
            digest.update(text)
            size += len(text)
    return size


def _best(run: Callable[[], Result]) -> tuple[Result, Taken]:
    taken = []
    for _ in range(ROUNDS):
        began, worked = time.perf_counter(), time.process_time()
        result = run()
        taken.append(Taken(time.perf_counter() - began, time.process_time() - worked))
    return result, Taken(*map(min, zip(*taken, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
