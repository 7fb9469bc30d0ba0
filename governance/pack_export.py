"""Exporting an evidence pack: what an auditor needs of one lineage, without our database and without the model.

The rows of the records and the claims are written aside from one state of the registry. Then the export is recorded in
the ledger, with a digest of all of them; then the pack is put together with the ledger as it is with that event at its
end. Had somebody else written in between, it begins again. So the pack holds the event that it was made by, the chain
and the signature of its head cover what the records' own events do not, and the records are those of the moment before
that event.

The file is written under a temporary name and flushed before it gets its own.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy.orm import Session

from governance.errors import SpaceError
from governance.output_files import publish, require_free, temporary_beside
from governance.pack_container import ContainerWriter
from governance.pack_format import (
    ARTIFACT_PREFIX,
    ARTIFACTS,
    CLAIMS,
    DOMAIN,
    EXPORTED,
    HEADS,
    LEDGER,
    MANIFEST,
    README,
    SIGNATURE,
    Export,
    claim_line,
    event_line,
    export_payload,
    manifest,
    order_of,
    records_member,
    signature,
)
from governance.pack_records import PackRecords, artifact_lines, parse_json, read_records
from governance.pack_texts import README_TEXT
from governance.told_records import ToldRecords
from governance.workspace import Workspace
from neuronledger import __version__
from registry import claims, ledger, queries
from registry.columns import parse_timestamp
from registry.errors import LedgerError, RegistryBusyError
from registry.keys import PrivateKey, PublicKey
from registry.record_digests import KINDS, record_names, records_of_lineage, stored_rows
from registry.signatures import sign_head

_ATTEMPTS = 5
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PackSummary:
    """An exported evidence pack: the file, and what is in it.

    Attributes:
        event: number of the event that the export is; the last one in the pack.
        artifacts: how many artifacts the pack holds.
        signed_by: fingerprint of the key that signed the ledger's head and the manifest; None if there was none.
    """

    lineage: str
    path: str
    sha256: str
    bytes: int
    event: int
    records: int
    protected_neurons: int
    artifacts: int
    signed_by: str | None


def export_pack(
    workspace: Workspace,
    lineage: str,
    target: Path,
    *,
    artifacts: bool = False,
    key: PrivateKey | None = None,
    force: bool = False,
) -> PackSummary:
    """Write the evidence pack of a lineage, and record in the ledger that it was exported.

    Args:
        workspace: the registry.
        lineage: the lineage.
        target: file to write.
        artifacts: whether the artifacts of patches and identifications come along; prompts and answers never do.
        key: signs the ledger's head and the manifest.
        force: whether a file that is there may be replaced.

    Raises:
        RecordNotFoundError: no lineage of that name.
        InputError: the file is there already, or belongs to the registry or to a model.
        ArtifactError: an artifact that is to come along is missing or was changed.
        LedgerError: an event of the ledger cannot be read.
        RegistryBusyError: others kept on writing to the registry.
        SpaceError: the file cannot be written.
    """
    with workspace.attempt("audit.export", "lineage", lineage):
        require_free(workspace, target, force=force)
        try:
            with (
                temporary_beside(target) as temporary,
                TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place,
            ):
                parts = _recorded_parts(workspace, lineage, Path(place), artifacts=artifacts, key=key)
                _write(temporary, parts, key)
                summary = _summary(temporary, target, parts)
                require_free(workspace, target, force=force)
                publish(temporary, target)
        except OSError as error:
            raise SpaceError(
                f"{target} cannot be written: {error.strerror or error}", "free space, or mend the permissions"
            ) from error
        return summary


@dataclass(frozen=True)
class _Parts:
    """What a pack is put together from.

    Attributes:
        export: what the ledger says of it.
        sources: member → its content, or the file that holds it.
    """

    export: Export
    sources: Mapping[str, bytes | Path]


@dataclass(frozen=True)
class _Gathered:
    """The records of a lineage at one state of the registry, written aside.

    Attributes:
        events: how many events there were.
        records: the records.
        claims: how many neurons are protected.
        sources: member → its content, or the file that holds it.
    """

    events: int
    records: PackRecords
    claims: int
    sources: Mapping[str, bytes | Path]


def _recorded_parts(
    workspace: Workspace, lineage: str, place: Path, *, artifacts: bool, key: PrivateKey | None
) -> _Parts:
    """Gather, record, and read the ledger with that record at its end; anew if others wrote in between."""
    for _ in range(_ATTEMPTS):
        with workspace.registry.read() as session:
            gathered = _gather(workspace, session, lineage, place, artifacts=artifacts)
        event = _record(workspace, lineage, gathered, artifacts=artifacts, key=key)
        sources = None if event is None else _ledger_with(workspace, event, place)
        if sources is not None and event is not None and (export := Export.of(event)) is not None:
            return _Parts(export, {**gathered.sources, **sources})
    raise RegistryBusyError("others kept on writing to the registry", "export again when they are done")


def _gather(workspace: Workspace, session: Session, lineage: str, place: Path, *, artifacts: bool) -> _Gathered:
    events = list(ledger.events(session))
    for event in events:
        if not ledger.is_canonical(event.payload):
            raise LedgerError(
                f"the payload of event {event.sequence} is not canonical JSON", "run neuronledger audit verify"
            )
    lineage_id = queries.lineage_id(session, lineage)
    named = ToldRecords.by(events).names(lineage)
    chosen = records_of_lineage(session, lineage_id)
    files: dict[str, Path] = {}
    for kind in KINDS:
        ids = chosen[kind.word] | {id_ for id_, name in record_names(session, kind).items() if name in named}
        for owner in (kind.row.id, *kind.parts):
            member = records_member(owner.class_.__tablename__)
            files[member] = place / member.replace("/", "-")
            _write_lines(files[member], ((row + b"\n", 1) for row in stored_rows(session, owner, ids)))
    records = read_records(lambda member: _read_lines(files[member]))
    files[CLAIMS] = place / CLAIMS
    protected = _write_lines(files[CLAIMS], _claim_lines(session, lineage_id, records))
    index = list(artifact_lines(records, included=artifacts))
    held = {str(entry["digest"]) for entry in map(parse_json, index) if entry["included"]}
    sources = {f"{ARTIFACT_PREFIX}{digest}": workspace.store.verify(digest) for digest in held}
    texts = {README: README_TEXT.encode(), ARTIFACTS: b"".join(index)}
    return _Gathered(len(events), records, protected, {**files, **sources, **texts})


def _claim_lines(session: Session, lineage_id: int, records: PackRecords) -> Iterator[tuple[bytes, int]]:
    lines = []
    for claim in claims.claims(session, lineage_id):
        patch = records.rows["patches"].get(claim.patch_id, {}).get("sequence", 0)
        module = records.modules.get(claim.module_id, f"module id {claim.module_id}")
        lines.append((patch, module, claim_line(patch, module, claim.neurons), len(claim.neurons)))
    yield from ((line, count) for _, _, line, count in sorted(lines))


def _record(
    workspace: Workspace, lineage: str, gathered: _Gathered, *, artifacts: bool, key: PrivateKey | None
) -> ledger.Event | None:
    """Tell the ledger of the export; None if it is not as it was."""
    if key is not None:
        registry = replace(workspace.registry, signer=lambda: partial(sign_head, key=key))
        workspace = replace(workspace, registry=registry)
    payload = export_payload(
        version=__version__,
        artifacts=artifacts,
        records=gathered.records.records,
        claims=gathered.claims,
        claims_digest=_digest(gathered.sources[CLAIMS]),
        key=key.public.hex if key is not None else None,
    )
    with workspace.registry.write() as session:
        if ledger.ledger_head(session)[0] != gathered.events:
            return None
        workspace.record(session, EXPORTED, "lineage", lineage, payload)
        (event,) = ledger.events(session, after=gathered.events)
        return event


def _ledger_with(workspace: Workspace, last: ledger.Event, place: Path) -> Mapping[str, bytes | Path] | None:
    """The ledger that ends with an event, and the exported heads of that moment; None if it goes on already."""
    with ExitStack() as reading:
        with workspace.registry.heads.shared() as heads:
            session = reading.enter_context(workspace.registry.read())
            count, _ = ledger.ledger_head(session)  # from here on the session sees this state
        if count != last.sequence:
            return None
        file = place / LEDGER
        _write_lines(file, ((event_line(event), 0) for event in ledger.events(session)))
        return {LEDGER: file, HEADS: heads or b""}


def _write(temporary: Path, parts: _Parts, key: PrivateKey | None) -> None:
    with temporary.open("xb") as file:
        writer = ContainerWriter(file, parse_timestamp(parts.export.at))
        for name in sorted(parts.sources, key=order_of):
            _add(writer, name, parts.sources[name])
        told = manifest(parts.export, writer.members)
        _add(writer, MANIFEST, told)
        if key is not None:
            _add(writer, SIGNATURE, signature(key.public.hex, key.sign(DOMAIN + told)))
        writer.finish()
        file.flush()
        os.fsync(file.fileno())


def _add(writer: ContainerWriter, name: str, source: bytes | Path) -> None:
    if isinstance(source, Path):
        writer.add(name, source.stat().st_size, _blocks(source))
    else:
        writer.add(name, len(source), [source])


def _summary(temporary: Path, target: Path, parts: _Parts) -> PackSummary:
    export = parts.export
    return PackSummary(
        lineage=export.lineage,
        path=str(target),
        sha256=_digest(temporary),
        bytes=temporary.stat().st_size,
        event=export.sequence,
        records=export.record_count,
        protected_neurons=export.claim_count,
        artifacts=sum(name.startswith(ARTIFACT_PREFIX) for name in parts.sources),
        signed_by=PublicKey(export.key).fingerprint if export.key is not None else None,
    )


def _write_lines(file: Path, lines: Iterable[tuple[bytes, int]]) -> int:
    """Write lines, and return the sum of the numbers beside them."""
    total = 0
    with file.open("wb") as writing:
        for line, count in lines:
            writing.write(line)
            total += count
    return total


def _read_lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as reading:
        yield from reading


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as reading:
        while block := reading.read(_BLOCK):
            yield block


def _digest(source: bytes | Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(source) if isinstance(source, Path) else [source]:
        digest.update(block)
    return digest.hexdigest()
