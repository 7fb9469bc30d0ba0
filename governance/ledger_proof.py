"""The proof outside the database: heads checked with their signatures, listed, signed, and handed out.

Signing is an event of the ledger itself, whose head is then appended signed. So counts go on increasing, a signature
covers everything before it, and a signature that was taken out of the head file is missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from governance.errors import InputError
from governance.workspace import Workspace
from registry.files import create_file, sync_directory
from registry.head_lines import Head, Line, check_heads, check_ledger, parse_lines
from registry.keys import PrivateKey, PublicKey, read_public_key
from registry.ledger import Event, Violation
from registry.signatures import Signatures, SignedBy, check_signatures, fingerprint, sign_head

SIGNED = "ledger.signed"
"""The action of the event that a signing is."""


@dataclass(frozen=True)
class LedgerProof:
    """Whether ledger, heads and signatures agree.

    Attributes:
        checked: how many of each were checked.
        not_checked: what was not.
        problems: what was found, each with the event, file or key that it is about.
        signed_by: what each key has signed of the registry's head file.
        unsigned_from: the first event that no signature covers; None if there is no such event.
    """

    checked: dict[str, int]
    not_checked: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    signed_by: tuple[SignedBy, ...]
    unsigned_from: int | None


@dataclass(frozen=True)
class Evidence:
    """What a reader brings along: keys that may sign, and a copy of the heads that was kept elsewhere."""

    keys: tuple[PublicKey, ...] = ()
    kept: tuple[Line, ...] = ()
    kept_at: Path | None = None


def read_evidence(public_keys: Sequence[Path] = (), heads: Path | None = None) -> Evidence:
    """Read public keys and a kept copy of the heads.

    Raises:
        KeyFileError: one of the files holds no public key.
        InputError: the copy cannot be read or is empty.
    """
    trusted = tuple(read_public_key(path) for path in public_keys)
    if heads is None:
        return Evidence(trusted)
    try:
        kept = parse_lines(heads.read_bytes())
    except OSError as error:
        raise InputError(f"the kept heads {heads} cannot be read: {error.strerror}", "check the path") from error
    if not kept:
        raise InputError(f"the kept heads {heads} are empty", "give the copy of a head file, or a line of one")
    return Evidence(trusted, kept, heads)


def check_proof(events: Sequence[Event], lines: Sequence[Line], evidence: Evidence) -> LedgerProof:
    """Check the ledger's chain, the registry's heads, their signatures, and a copy of the heads kept elsewhere."""
    signatures = check_signatures(lines, evidence.keys)
    problems = [_about_event(violation) for violation in check_ledger(lines, events)]
    problems += [_about_event(violation) for violation in signatures.problems]
    problems += _lost_signatures(events, lines)
    checked = {"events": len(events), "exported heads": len(lines)}
    signed = signatures.heads
    if evidence.kept_at is not None:
        kept = check_signatures(evidence.kept, evidence.keys)
        found = [*check_heads(evidence.kept, events, whole=False), *kept.problems]
        problems += [(str(evidence.kept_at), violation.problem) for violation in found]
        checked["kept heads"] = len(evidence.kept)
        signed += kept.heads
    if signed or evidence.keys:
        checked["signed heads"] = signed
    if evidence.keys and not any(key.heads for key in signatures.signed_by if key.trusted):
        problems.append(("ledger", "no exported head is signed by any of the keys given"))
    return LedgerProof(
        checked,
        () if evidence.keys or not signed else (f"whose signatures those of {signed} heads are (pass --public-key)",),
        tuple(problems),
        signatures.signed_by,
        _unsigned_from(signatures, len(events)),
    )


@dataclass(frozen=True)
class HeadSummary:
    """One line of the head file; what is not a head has only its `problem`."""

    line: int
    count: int | None
    after: int | None
    at: str | None
    hash: str | None
    key: str | None
    problem: str | None = None


def list_heads(workspace: Workspace) -> list[HeadSummary]:
    """The lines of the head file, oldest first; signatures are not checked here."""
    return [_summary(number, line) for number, line in enumerate(workspace.registry.heads.read(), start=1)]


def copy_heads(workspace: Workspace, output: Path) -> int:
    """Write a copy of the head file, to be kept elsewhere.

    Returns:
        the number of its lines.

    Raises:
        InputError: the output is there already, or there is nothing to copy.
    """
    with workspace.registry.heads.shared() as content:
        if not content:
            raise InputError("there are no exported heads yet", "change something, or run `neuronledger recover`")
    _write_new(output, content)
    return len(parse_lines(content))


@dataclass(frozen=True)
class SignedHead:
    """A head that was signed: of which event, with which key, and the line as it stands in the head file."""

    event: int
    hash: str
    at: str
    fingerprint: str
    line: str
    output: Path | None


def sign_ledger(workspace: Workspace, key: PrivateKey, output: Path | None = None) -> SignedHead:
    """Record that the ledger is signed, and append the head of that event signed.

    Args:
        workspace: the registry.
        key: signs.
        output: a new file for the signed line, to be handed out.

    Raises:
        InputError: the output is there already.
        RegistryError: the registry or the head file cannot be written.
    """
    if output is not None:
        _require_new(output)
    registry = replace(workspace.registry, signer=lambda: partial(sign_head, key=key))
    with registry.write() as session:
        event = registry.record(
            session,
            action=SIGNED,
            subject_kind="ledger",
            subject_name="ledger",
            payload={"key": key.public.hex},
            actor=workspace.actor,
            now=workspace.clock(),
        )
    head = next(line for line in registry.heads.read() if isinstance(line, Head) and line.count == event.sequence)
    if output is not None:
        _write_new(output, head.line().encode() + b"\n")
    return SignedHead(head.count, head.hash, head.at, key.public.fingerprint, head.line(), output)


def _about_event(violation: Violation) -> tuple[str, str]:
    return f"event {violation.sequence}" if violation.sequence else "ledger", violation.problem


def _lost_signatures(events: Sequence[Event], lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Signings that no signed head bears witness to. One that comes later covers them as well."""
    last = max((line.count for line in lines if isinstance(line, Head) and line.signature), default=0)
    lost = [event.sequence for event in events if event.action == SIGNED and event.sequence > last]
    if not lost:
        return []
    problem = (
        "says that the ledger was signed, but no exported head from there on is: the signature was removed, or a "
        "process died before it was written; look for the line in a kept copy, and sign again with `audit sign`"
    )
    return [(f"event {lost[0]}", f"event {lost[0]} {problem}")]


def _unsigned_from(signatures: Signatures, events: int) -> int | None:
    return signatures.last + 1 if signatures.last < events else None


def _summary(number: int, line: Line) -> HeadSummary:
    if not isinstance(line, Head):
        return HeadSummary(number, None, None, None, None, None, f"{line.problem}: {line.text}")
    key = fingerprint(line.key) if line.key else None
    return HeadSummary(number, line.count, line.after, line.at, line.hash, key)


def _require_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists", "choose another name")


def _write_new(path: Path, content: bytes) -> None:
    _require_new(path)
    try:
        create_file(path, content)
        sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose a place that you may write") from error
