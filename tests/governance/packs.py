"""Evidence packs taken apart and put together again, as somebody does who wants to change what they say."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from governance.pack_container import ContainerWriter, content, read_container
from governance.pack_format import (
    CLAIMS,
    HEADS,
    LEDGER,
    MANIFEST,
    Export,
    digest_of_records,
    event_line,
    manifest,
    order_of,
    parse_event,
)
from governance.pack_records import read_records
from governance.pack_verification import PackVerification, verify_pack
from governance.proof_checks import Evidence
from registry.chain import Event
from registry.head_lines import Head
from tests.registry.chains import rechained

NOTHING = Evidence()


def verify(pack: bytes, evidence: Evidence = NOTHING) -> PackVerification:
    """Verify a pack in memory."""
    return verify_pack(io.BytesIO(pack), evidence)


def subjects(pack: bytes, evidence: Evidence = NOTHING) -> set[str]:
    """What the findings are about."""
    return {finding.subject for finding in verify(pack, evidence).findings}


@dataclass(frozen=True)
class OpenPack:
    """The members of a pack by name, in its order, and the time that they bear."""

    members: Mapping[str, bytes]
    moment: datetime

    @classmethod
    def of(cls, pack: bytes) -> "OpenPack":
        """Take a sound pack apart."""
        file = io.BytesIO(pack)
        container = read_container(file)
        assert container.problems == ()
        members = {member.name: b"".join(content(file, member)) for member in container.members}
        (*_, last) = members[LEDGER].splitlines(keepends=True)
        event = parse_event(last)
        assert event is not None
        return cls(members, datetime.fromisoformat(event.created_at))

    @property
    def events(self) -> list[Event]:
        """The events of its ledger."""
        found = [parse_event(line) for line in self.members[LEDGER].splitlines(keepends=True)]
        return [event for event in found if event is not None]

    def packed(self) -> bytes:
        """A container of these members, in their order, as an export writes it."""
        return packed(list(self.members.items()), self.moment)

    def changed(self, **members: bytes) -> "OpenPack":
        """Members replaced; `records_patches` is `records/patches.jsonl`."""
        names = {name.replace("/", "_").partition(".")[0]: name for name in self.members}
        return self.with_members({names[name]: text for name, text in members.items()})

    def with_members(self, members: Mapping[str, bytes]) -> "OpenPack":
        """Members replaced or put in, in the order of a pack."""
        every = {**self.members, **members}
        return replace(self, members={name: every[name] for name in sorted(every, key=order_of)})

    def without(self, *names: str) -> "OpenPack":
        """Members taken out."""
        return replace(self, members={name: text for name, text in self.members.items() if name not in names})

    def with_manifest(self) -> "OpenPack":
        """The manifest computed anew from the other members."""
        export = Export.of(self.events[-1])
        assert export is not None
        members = read_container(io.BytesIO(self.packed())).members
        return self.with_members({MANIFEST: manifest(export, members)})

    def forged(self) -> "OpenPack":
        """Everything computed anew that can be without a key: digests in events, the chain, heads and manifest."""
        records = read_records(lambda name: self.members[name].splitlines(keepends=True)).records
        claims = self.members[CLAIMS]
        told = {record.name: record.digest for record in records}
        changed: dict[str, str] = {}
        events = self.events
        for name, digest in told.items():
            for event in reversed(events):
                old = json.loads(event.payload).get("records", {}).get(name)
                if old is not None:
                    changed[old] = digest
                    break
        export = Export.of(events[-1])
        assert export is not None
        changed[export.records_digest] = digest_of_records(records)
        changed[export.claims_digest] = hashlib.sha256(claims).hexdigest()
        again = rechained([replace(event, payload=_replaced(event.payload, changed)) for event in events])
        heads = [Head(e.sequence, e.hash, e.created_at, e.sequence - 1).line() + "\n" for e in again]
        ledger = b"".join(map(event_line, again))
        return self.with_members({LEDGER: ledger, HEADS: "".join(heads).encode()}).with_manifest()


def packed(members: list[tuple[str, bytes]], moment: datetime) -> bytes:
    """A container of members in any order and number."""
    file = io.BytesIO()
    writer = ContainerWriter(file, moment)
    for name, text in members:
        writer.add(name, len(text), [text])
    writer.finish()
    return file.getvalue()


def _replaced(text: str, changed: Mapping[str, str]) -> str:
    for old, new in changed.items():
        text = text.replace(old, new)
    return text
